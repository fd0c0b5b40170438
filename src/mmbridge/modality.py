"""The names of the media that a message may hold, and nothing else."""

MEDIA = ("image", "audio", "video", "depth", "normal", "pointcloud", "imu", "fmri")
"""Media types, in the order in which tables list them."""

CONTENT_TYPES = ("text", *MEDIA)
"""Every content-part type of the message schema."""
