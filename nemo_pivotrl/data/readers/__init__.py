"""Outside trajectory formats -> `Trajectory`. The format of every record is found by looking at it, unless the recipe names it.

files     the records of a file, whatever it is packed in
detect    what a record is; formats that are refused, with their remedies
chat      chat messages of all dialects; gym: NeMo-Gym and the Responses API; agents: result files of harnesses
messages  roles, blocks, calls, reasoning; markup: what models write into text; tools: definitions; fields: task, outcome, weight

Every record is read, refused by name, or counted under the reason it was left out for.
"""

from __future__ import annotations

from nemo_pivotrl.data.readers.files import read_records
from nemo_pivotrl.data.readers.messages import ROLES, FieldError, check_messages
from nemo_pivotrl.data.readers.reading import FileReading, Reading, read_trajectories

__all__ = ["ROLES", "FieldError", "FileReading", "Reading", "check_messages", "read_records", "read_trajectories"]
