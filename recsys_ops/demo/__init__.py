"""The demo: recommenders trained on real purchases, before and after ``recsys_ops.accelerate``, and HSTU."""

from recsys_ops.demo.run import run_demo

__all__ = ["run_demo"]
