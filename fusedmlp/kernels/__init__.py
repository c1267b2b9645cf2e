"""One package per backend; each is imported when it is first chosen."""
