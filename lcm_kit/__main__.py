"""`python -m lcm_kit`, which is also what `accelerate launch -m lcm_kit` runs."""

from lcm_kit.cli.main import main

if __name__ == "__main__":
    main()
