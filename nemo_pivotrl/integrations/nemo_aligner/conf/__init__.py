"""The complete YAML files of the launch scripts, importable so that Hydra finds them as `pkg://` from any script."""
