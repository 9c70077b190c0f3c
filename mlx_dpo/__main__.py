"""`python -m mlx_dpo` is the same as `mlx_dpo`."""

from mlx_dpo.cli import main

if __name__ == "__main__":
    main()
