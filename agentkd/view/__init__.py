"""The viewer: trajectories on a page, served on this machine or written into one file.

:mod:`.runs` finds the runs in a folder and keeps an index of their lines, :mod:`.row` says what the
list shows of one, :mod:`.page` builds the page, :mod:`.server` serves it. What is read is JSON, not
:class:`~agentkd.trajectory.Trajectory`: a line of an older version, of a newer one or without
a field is shown as far as it goes, and what cannot be shown is said.
"""

from agentkd.view.page import export_page
from agentkd.view.runs import Mask, Run, open_runs
from agentkd.view.server import Viewer

__all__ = ["Mask", "Run", "Viewer", "export_page", "open_runs"]
