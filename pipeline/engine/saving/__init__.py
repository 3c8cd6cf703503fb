"""Writing checkpoints: snapshot, files, publishing, retention."""
