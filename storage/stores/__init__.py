"""Object stores: local folders and S3, with create-once writes and reads of a pinned version."""
