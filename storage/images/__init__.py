"""Untrusted images: checks each format's headers, then decodes the pixels to RGB."""
