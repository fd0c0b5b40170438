"""The names of the media that a message may hold, and of files that hold them."""

MEDIA = ("image", "audio", "video", "depth", "normal", "pointcloud", "imu", "fmri")
"""Media types, in the order in which tables list them."""

CONTENT_TYPES = ("text", *MEDIA)
"""Every content-part type of the message schema."""

PAIRED = ("depth", "normal")
"""Maps, which may come with the picture of the same view."""

SUFFIXES = {
    "image": ".png",
    "audio": ".wav",
    "video": ".mp4",
    "depth": ".npy",
    "normal": ".npy",
    "pointcloud": ".npy",
    "imu": ".csv",
    "fmri": ".npy",
}
"""How files end that are written of what has no name yet; all but pictures', sounds' and videos' hold every bit."""
