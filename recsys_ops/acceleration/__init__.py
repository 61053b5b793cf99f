"""The parts of ``recsys_ops.accelerate``: finding lookups, swapping them, proving and timing the swaps."""
