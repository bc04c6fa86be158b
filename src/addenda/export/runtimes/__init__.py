"""Programs that run exported files, one file each, asked what they answer."""
