"""Pages that are owed after the resume: which are missing, which go next. No I/O."""
