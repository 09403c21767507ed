"""Communication: transport, wire format, codecs, and the meter. Only this package imports ``torch.distributed``."""

from dfed.comm.launcher import adopt, agree, is_orphaned, without_launcher
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
    "adopt",
    "agree",
    "choose_device",
    "is_orphaned",
    "join",
    "launched_size",
    "local_rank",
    "without_launcher",
]
