"""Server reflection under both of its names, `grpc.reflection.v1` and `v1alpha`.

The two have the same messages but for the package's name, and the library at hand knows v1alpha
alone; v1's descriptor is made from it. Only what a port serves can be asked for.
"""

from collections.abc import AsyncGenerator, AsyncIterable, Iterable

from google.protobuf import descriptor_pb2, json_format
from google.protobuf.descriptor import FileDescriptor, ServiceDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection import aio as stock

from fusewire.service.rpc.call import Call

V1 = "grpc.reflection.v1.ServerReflection"
SERVICE: ServiceDescriptor = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]


class Reflection:
    """Describes some services, itself included.

    Args:
        services: what the port serves besides.
    """

    def __init__(self, services: Iterable[ServiceDescriptor]) -> None:
        served = [*services, SERVICE]
        names = [*(service.full_name for service in served), V1]
        self._stock = stock.ReflectionServicer(names, pool=_pool(service.file for service in served))

    async def ServerReflectionInfo(  # noqa: N802
        self, requests: AsyncIterable[reflection_pb2.ServerReflectionRequest], call: Call
    ) -> AsyncGenerator[reflection_pb2.ServerReflectionResponse]:
        """Answer each question of the stream."""
        async for response in self._stock.ServerReflectionInfo(requests, None):
            yield response


def _pool(files: Iterable[FileDescriptor]) -> DescriptorPool:
    """Collect files and what they import, v1's reflection among them."""
    pool = DescriptorPool()

    def add(file: FileDescriptor) -> None:
        for imported in file.dependencies:
            add(imported)
        pool.AddSerializedFile(file.serialized_pb)

    for file in files:
        add(file)
    pool.AddSerializedFile(_reflection_v1().SerializeToString())
    return pool


def _reflection_v1() -> descriptor_pb2.FileDescriptorProto:
    """Rename v1alpha's descriptor, file and package and every reference."""
    alpha = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(alpha)
    renamed = json_format.MessageToJson(alpha).replace("v1alpha", "v1")
    return json_format.Parse(renamed, descriptor_pb2.FileDescriptorProto())
