"""The shipped passes, one file or one package each. Import them as `plmcc.passes`."""

if __name__ != "plmcc.passes":
    raise ImportError(f"the passes are the package plmcc.passes, not {__name__!r}")
