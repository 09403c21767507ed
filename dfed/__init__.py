"""dfed: federated training under real memory limits, on torch.distributed."""

__version__ = "0.1.0"
__all__ = ["__version__"]
