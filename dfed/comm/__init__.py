"""Communication: transport, wire format, codecs, and the meter. Only this package imports ``torch.distributed``."""

from dfed.comm.process_group import BackendSettings, Link, choose_device, join, launched_size, local_rank
from dfed.comm.transport import Local, ProcessGroup, Transport
from dfed.comm.wire import Entry, Message

__all__ = [
    "BackendSettings",
    "Entry",
    "Link",
    "Local",
    "Message",
    "ProcessGroup",
    "Transport",
    "choose_device",
    "join",
    "launched_size",
    "local_rank",
]
