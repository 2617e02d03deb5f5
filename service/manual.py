"""What `fusewire --help` and the help of each command say, beside the options themselves."""

EXIT_STATUS = """
exit status:
  0    done
  1    the call or the server failed; one line on standard error says why
  2    the command line or the configuration cannot be used, or the input is not UTF-8
  130  interrupted by Ctrl-C
"""

DESCRIPTION = """\
Fusewire serves Qwen3-style language models over gRPC with streaming generation. The QK norm of the
model (per-head RMSNorm of queries and keys before RoPE) runs on one of three paths, in prefill and
in decode alike, and the path can be changed per request or for the whole server while it runs:

  unfused     separate operations, the way a model file spells the chain
  fused_norm  the two norms in one launch
  fused       norm, RoPE and the write into the paged KV cache together (the default)
"""

EXAMPLES = """
examples:
  fusewire demo                               see it work, on the embedded model
  fusewire serve                              serve the embedded model on 127.0.0.1:50051
  fusewire generate 'Once upon a time'        stream an answer to the terminal
  fusewire chat                               talk to the model
  fusewire compare 'Once upon a time'         two kernel paths side by side: same tokens, and how fast
  fusewire mode set unfused                   change the kernel path of the running server
"""

SERVE_DESCRIPTION = """\
Serve a model over gRPC until SIGTERM or Ctrl-C; then new requests are refused, running ones finish,
and the exit status is 0.

Every option can also be set by its variable in the environment or by its name (with underscores) in
a TOML file. The command line wins over the environment, the environment over the file. Everything
binds to loopback unless told otherwise; another address needs TLS or --insecure.

Clients may send a keepalive ping every 10 seconds; those that ping more often are disconnected.
"""

SERVE_EXAMPLES = """
examples:
  fusewire serve                              the embedded demo model
  fusewire serve --model Qwen/Qwen3-0.6B      a model of the hub, or a folder
  fusewire serve --config fusewire.toml       options from a file, for instance max_running = 32
  FUSEWIRE_PORT=6000 fusewire serve           an option from the environment
"""

GENERATE_DESCRIPTION = """\
Send one prompt and stream the answer to standard output as it comes; a line on standard error then
tells tokens, latency and the kernel path. What no option says is the server's choice: the sampling
knobs of the model's generation_config, and the server's kernel path.
"""

GENERATE_EXAMPLES = """
examples:
  fusewire generate 'Once upon a time' --max-tokens 64
  fusewire generate --chat 'Who was Emma?' --temperature 0.7 --seed 1
  fusewire generate --chat 'Who was Emma?' --template-argument enable_thinking=false
  fusewire generate --mode unfused --json 'Once upon a time' | jq .timings
  fusewire generate --stop $'\\n\\n' - < prompt.txt
"""

CHAT_DESCRIPTION = """\
Talk to the model; every turn is sent with the turns before it, answers whole: a model that thinks
aloud has a chat template that strips the thoughts from earlier turns. Ctrl-C ends an answer that is
being written, and leaves the chat when none is. Lines that begin with a slash are commands:

  /mode [MODE]  show or set the kernel path of the next answers (default: the server's)
  /reset        forget the conversation
  /quit         leave, as does the end of the input
"""

CHAT_EXAMPLES = """
examples:
  fusewire chat
  fusewire chat --system 'Answer in one sentence.' --temperature 0.7
  fusewire chat --template-argument enable_thinking=false
"""

COMPARE_DESCRIPTION = """\
Run two kernel paths side by side on a running server, and tell whether that changes anything and what
it gains. Both sides are greedy and do not use the prefix cache. First both run at once, and their texts
are shown as they come; this pass is not timed. Then each runs alone, in the order left, right, right,
left, …, and the report tells

  latency    time to first token (TTFT), prefill, time per further token (TPOT) and decode of each side:
             median, lowest and highest, and the left median over the right
  QK norm    device time of that step in one layer, and the share of all layers' in the step
  logits     how far they differ at each position, both sides fed the left one's tokens
  load       what else ran on the server meanwhile

and closes with a sentence. In a terminal the two texts grow in two columns, other tokens in another
colour; elsewhere plain text follows when all is done.

The exit status is also 1 if the tokens differ beyond the tolerance, so that this can be a check. They do
if the sides have the same prompt and

  (compared - agreeing) / compared > T          T as --tolerance sets it

where compared is the number of tokens of the longer answer, and agreeing the number of tokens before the
first that differs: greedy answers that part once need not meet again. A first difference at a tie, as
--tie-gap defines it, does not count; of positions after the 512th the lead is not known, so there it
does. Sides with different prompts never end with 1 for their tokens.

--prompts FILE compares each line of a file and prints a line for each and a summary; ratios are the left
median over the right one, and summed up by their geometric mean. A line that begins with { is JSON:
{"text": "…"}, {"messages": [{"role": "user", "content": "…"}]} or {"token_ids": [1, 2]}; any other line is
a text, and blank lines are skipped. The first call that fails ends the batch. With --json each line is
an object, the last one the summary.
"""

COMPARE_EXAMPLES = """
examples:
  fusewire compare 'Once upon a time'
  fusewire compare --chat 'Who was Emma?' --left fused_norm --max-tokens 64
  fusewire compare --left fused --right fused 'Once' --right-prompt 'Twice'
  fusewire compare --json - < prompt.txt | jq .verdict
  fusewire compare --prompts prompts.txt --repetitions 0 --tie-gap 0.01 || echo 'the answers differ'
"""

MODE_DESCRIPTION = """\
Show or change the kernel path of requests that pin none, on a running server (admin port).
"""

MODE_GET_DESCRIPTION = """\
Print the server's kernel path, the implementation behind it, how often it has been changed (the
generation, which starts at 1), the paths that can be switched to, how traffic is split between them,
and what the shadow guard does, which holds the paths against each other while they run.
"""

MODE_SET_DESCRIPTION = """\
Change the kernel path from the next step on, without a restart or a dropped request. Running
requests that follow the server's default switch too; those that pinned a path keep theirs.

With --split, requests that pin no path are shared between several: either each keeps to one, chosen by
its id, or the whole server takes turns by the clock. The first is to see whether answers stay right;
the paths then share one queue, so their latencies are coupled. Latencies are compared by the second. A
change without --split ends a split. What is printed is what holds then: the path, and the split or that
there is none.
"""

MODE_REARM_DESCRIPTION = """\
End a fallback of the shadow guard: the path that it left becomes the server's kernel path again, and is
watched again. Fails if the guard has not fallen back.
"""

MODE_EXAMPLES = """
examples:
  fusewire mode get
  fusewire mode set unfused
  fusewire mode set fused --expected-generation 2 --json
  fusewire mode set --split fused=10,unfused=90
  fusewire mode set --split fused=50,unfused=50 --split-kind time-slice --slice-seconds 5
  fusewire mode rearm
"""

HEALTH_DESCRIPTION = """\
Print the health of a server, SERVING or NOT_SERVING, by the standard grpc.health.v1 service. The
exit status is 0 for SERVING and 1 for anything else, so that it can be a container's health check.
"""

HEALTH_EXAMPLES = """
examples:
  fusewire health
  fusewire health --wait 120                  wait until a server that is starting serves
  fusewire health --service fusewire.v1.GenerationService
"""

TOP_DESCRIPTION = """\
Watch a running server through its metrics (--metrics-host and --metrics-port of fusewire serve), from one
look to the next:

  state     the engine and its restarts, the default kernel path, its split and what steps ran on, the
            shadow guard
  load      running and waiting requests, KV cache, prefix cache; rates a second
  counts    requests that ended or were not admitted, calls by gRPC code; in brackets, what is new
  requests  latencies by phase and kernel path: mean and quantiles of the interval
  steps     time of a step by phase and path, as the host sees it and on the device
  QK norm   device time of that step in one layer

Quantiles are estimated within a histogram's buckets; "≥" is beyond the last one. A row stays once anything
was observed for it, and shows dashes while nothing is. "… ago" goes by this machine's clock.

In a terminal the view is redrawn until Ctrl-C, as much of it as fits; elsewhere each interval is printed
below the last. A server that cannot be reached is asked on, and one that was started again is followed, and
either is told; with --once the exit status is 1 if it cannot be reached. With --json times are in seconds,
shares from 0 to 1, and what is not known is null.
"""

TOP_EXAMPLES = """
examples:
  fusewire top
  fusewire top --metrics http://gpu-7:9464/metrics --interval 5
  fusewire top --once
  fusewire top --once --json --interval 10 | jq .rates.generation_tokens
"""

LOG_LEVEL_DESCRIPTION = """\
Show or change what a running server logs (admin port), from the next line on, in all of its processes.
An engine or a front end that is started again goes on with the changed level; a server that is, does
not: its level is --log-level.
"""

LOG_LEVEL_EXAMPLES = """
examples:
  fusewire log-level get
  fusewire log-level set debug                for a while, to look for a fault
  fusewire log-level set info
"""

DRAIN_DESCRIPTION = """\
Make a server refuse new requests and wait until the running ones have ended (admin port). The
server stays up, and its health says NOT_SERVING.
"""

DEMO_DESCRIPTION = """\
Start a server on the embedded model and on free loopback ports, stream one prompt over gRPC on the
unfused and on the fused path, print the text as it comes and then the latency of each path by
phase, and stop the server. Latencies are the server's own account of each request: medians over
some repetitions, the two paths taking turns, after a pass that is not timed.
"""

DEMO_EXAMPLES = """
examples:
  fusewire demo
  fusewire demo --prompt 'Once upon a time' --max-tokens 96
  fusewire demo --json
"""

BENCH_DESCRIPTION = """\
Measure what Fusewire is made of on this machine, beside other ways to do the same. Every figure comes
with the device, the versions and the command it was measured with.
"""

BENCH_KERNELS_DESCRIPTION = """\
Measure the QK-norm step (per-head RMSNorm of q and k, RoPE, paged KV write) on Fusewire's three paths
and beside them: F.rms_norm with torch operations, torch.compile, the step as three Triton launches and
each of them alone, vLLM, FlashInfer and Liger where they can be imported, and a copy of the same bytes.

Each contender is first checked against float64 on fresh data. On CUDA it is then timed as calls in one
CUDA graph over rotating buffers, from a cold L2 cache, and as eager calls by the clock. Shares are of
the rate at which this device copies 1 GiB, measured in the same run, by the bytes that cannot be
avoided. On a CPU there is wall time only. Contenders that cannot take part or fail are listed with the
reason.
"""

BENCH_EXAMPLES = """
examples:
  fusewire bench kernels                          every contender, the default sizes
  fusewire bench kernels --heads 32/8 --tokens 1,4096 --only unfused,fused
  fusewire bench kernels --out run.json --plot run.png
  fusewire bench kernels --from run.json          show a saved run
  fusewire bench kernels --claim kernel           is one norm kernel 2-7x faster?
  fusewire bench kernels --claim prefill          is a launch-bound prefill forward 2x faster?
"""

BENCH_ENGINE_DESCRIPTION = """\
Measure the engine in this process as it is built to serve, without sockets and without text:

  latency  one request by itself: time to the first token (TTFT), time per further token (TPOT)
  prefill  prompts of several lengths, each by itself, answered with one token
  decode   batches of equal requests that arrive at once: tokens per second, time of a step
  mix      256 requests of 100 to 1024 tokens in and out that arrive at once, sampled
  chunked  the time between the tokens of 32 streams (ITL) before and while a long prompt is prefilled

Prompts are random token ids that no earlier request has sent; answers are greedy, but for the mix, and
go on to their full length. Every count of tokens is checked. The raw samples are in the JSON. Where
device and model are those of a yardstick (vLLM and transformers on an H100), its figure stands beside.
The defaults on a CPU are small, and say nothing about a GPU.
"""

BENCH_ENGINE_EXAMPLES = """
examples:
  fusewire bench engine                           every part, on the demo model
  fusewire bench engine --model DIR --parts latency,decode --out run.json
  fusewire bench engine --model DIR --start-only  how long until it would serve, and what takes it
  fusewire bench engine --from run.json --from other.json --page results.md
"""

BENCH_SERVE_DESCRIPTION = """\
Send many streams to a running server and tell what its clients saw: tokens per second, time to first
token (TTFT), time between messages (ITL) and per token (TPOT), tokens a message, and streams that
failed. Clients are processes of their own, each with connections of its own; prompts are random token
ids that no earlier run has sent, answers go on to their full length, and tokens are counted from the
usage that ends each stream. One round of streams warms everything up before any that counts.

Where clients and server share one machine they share its cores, so the figures are for all of them. The
exit status is 1 if any stream failed.
"""

BENCH_SERVE_EXAMPLES = """
examples:
  fusewire bench serve                            64 streams kept full, 512 requests
  fusewire bench serve --loads kept-full,single,burst --json --out run.json
  fusewire bench serve --streams 256 --requests 2048 --processes 8 --mode unfused
"""
