from biflow import _library  # noqa: F401
