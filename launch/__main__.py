"""``python -m launch`` is `slt`."""

from launch.start import main

if __name__ == "__main__":
    main()
