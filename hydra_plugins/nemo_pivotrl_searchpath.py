"""Lets any Hydra program find `gpt_pivotrl` and `gpt_llmdoctor` by name: `defaults: [gpt_pivotrl, _self_]`.

Hydra looks for plugins in this namespace package, which is why it has no `__init__.py`.
"""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class NemoPivotrlSearchPath(SearchPathPlugin):
    """Appends the package's config folder: a script's own files come first."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called by Hydra for every program."""
        search_path.append("nemo_pivotrl", "pkg://nemo_pivotrl.integrations.nemo_aligner.conf")
