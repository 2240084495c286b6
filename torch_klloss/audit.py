"""The old path of `torch_klloss.auditing`; `torch_klloss.audit` is the function."""

raise ImportError("torch_klloss.audit is a function; its package is torch_klloss.auditing: import from there.")
