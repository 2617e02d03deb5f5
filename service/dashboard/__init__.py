"""The page of `fusewire serve --dashboard`: kernel path, latencies of each path, a comparison.

Plain HTTP on loopback, in the process that has the metrics. What the page asks for goes to the same
services that gRPC clients call; messages travel as protobuf's JSON. Knows no engine and no torch.
"""

from fusewire.service.dashboard.server import Dashboard

__all__ = ["Dashboard"]
