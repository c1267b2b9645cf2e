"""One module or package a backend, each imported when it is first chosen, and what chooses."""
