"""`ModelService`: what is served, by what, and how busy it is."""

import time
from importlib.metadata import version

import grpc

from fusewire.service.rpc.call import Call
from fusewire.service.rpc.errors import StatusError, quote
from fusewire.service.rpc.serving import Serving
from fusewire.service.wire import WIRE_MODES
from fusewire.v1 import model_pb2 as pb


class ModelService:
    """Answers the RPCs of `fusewire.v1.ModelService`; names and messages are the proto's."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def GetModel(self, request: pb.GetModelRequest, call: Call) -> pb.GetModelResponse:  # noqa: N802
        """Describe the model, if it is the one asked for."""
        if request.name not in ("", self._serving.model_name):
            raise StatusError(grpc.StatusCode.NOT_FOUND, f"name: {quote(request.name)} is not served here")
        return pb.GetModelResponse(model=self._model())

    async def ListModels(self, request: pb.ListModelsRequest, call: Call) -> pb.ListModelsResponse:  # noqa: N802
        """Describe the one model."""
        return pb.ListModelsResponse(models=[self._model()])

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, call: Call) -> pb.GetServerInfoResponse:  # noqa: N802
        """Describe the server; while the engine loads, without what only the engine knows."""
        serving = self._serving
        info = pb.GetServerInfoResponse(
            version=version("fusewire"),
            max_waiting_requests=serving.config.max_waiting,
            kv_block_size=serving.config.block_size,
            uptime_seconds=time.monotonic() - serving.started,
        )
        info.degradations.extend(serving.degradations)
        if (ready := serving.engine.ready) is not None:
            info.max_running_requests, info.max_step_tokens = ready.max_running, ready.max_step_tokens
            info.device, info.attention_backend = ready.device, ready.attention_backend
            info.kv_blocks = ready.kv_blocks
            info.kernel_backends.extend(
                pb.KernelBackend(mode=WIRE_MODES[mode], backend=backend)
                for mode, backend in ready.kernel_backends.items()
            )
        return info

    async def GetLoad(self, request: pb.GetLoadRequest, call: Call) -> pb.GetLoadResponse:  # noqa: N802
        """Tell the load that the engine reported last."""
        load = self._serving.load
        return pb.GetLoadResponse(
            running_requests=load.running,
            waiting_requests=load.waiting,
            kv_cache_usage_ratio=load.kv_usage,
            draining=self._serving.draining,
        )

    def _model(self) -> pb.Model:
        model = self._serving.ready.model
        return pb.Model(
            name=self._serving.model_name,
            architecture=model.architecture,
            context_length=model.context_length,
            vocab_size=model.vocab_size,
            parameters=model.parameters,
            layers=model.layers,
            query_heads=model.query_heads,
            kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            dtype=model.dtype,
            eos_token_ids=model.eos_ids,
            chat=self._serving.tokenizer.has_chat_template,
        )
