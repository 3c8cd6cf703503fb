"""``python -m shards.cli`` is `slt shards`."""

from shards.cli.app import app

if __name__ == "__main__":
    app()
