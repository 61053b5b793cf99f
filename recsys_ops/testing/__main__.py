"""Runs one example of the suite: the line that a failure prints."""

from __future__ import annotations

import argparse
import json
import os
import sys

import torch

from recsys_ops.backends import BACKENDS, operators
from recsys_ops.testing.contract import OperatorSpec
from recsys_ops.testing.execution import Target
from recsys_ops.testing.registry import CHECKS, HERE, Subject
from recsys_ops.testing.verify import spec_of


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 if the example passes, 1 if it fails, 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m recsys_ops.testing", description=__doc__)
    parser.add_argument("op", choices=sorted(operators()))
    parser.add_argument("check", choices=list(CHECKS))
    parser.add_argument("case", help="its name, as the suite prints it")
    parser.add_argument("--backend", choices=list(BACKENDS), default="reference")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--simd", help="instruction set of the native backend")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(HERE, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    dtype = getattr(torch, options.dtype, None)
    if not isinstance(dtype, torch.dtype):
        parser.error(f"argument --dtype: expected a dtype such as float32, got {options.dtype!r}")
    spec = spec_of(options.op)
    try:
        subject = _subject(spec, options.check, options.case)
    except ValueError as error:
        parser.error(f"argument case: {error}")
    target = Target(options.backend, options.device, options.simd)
    check = CHECKS[options.check]
    if options.here:
        print(json.dumps(check.fault(spec, subject, target, dtype, options.seed)), flush=True)
        # Whatever still holds memory of a GPU that a kernel's assertion has made useless fails to free it.
        os._exit(0)
    result = check(spec, subject, target, dtype, options.seed)
    print(result)
    return 0 if result.ok else 1


def _subject(spec: OperatorSpec, check: str, name: str) -> Subject:
    listed: dict[str, Subject] = {s.name: s for s in CHECKS[check].subjects(spec, False)}
    if name in listed:
        return listed[name]
    if check in ("isolation", "bad_input", "mutant"):
        raise ValueError(f"expected one of {list(listed)}, got {name!r}")
    return spec.case.from_name(name)


if __name__ == "__main__":
    sys.exit(main())
