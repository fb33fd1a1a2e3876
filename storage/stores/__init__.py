"""Object stores: local folders and S3, with conditional creates and pinned reads."""
