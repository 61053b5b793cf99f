"""``python -m recsys_ops`` is ``recsys-ops``."""

from recsys_ops.cli import main

if __name__ == "__main__":
    main()
