"""Exchange: trajectories to and from the formats that others use.

One module a format, and :data:`FORMATS` names them. A row is decoded to a
:class:`~agentkd.exchange.draft.Draft`, which becomes a trajectory; what a format has no field for
travels beside it where there is room, and is counted where there is not
(:mod:`agentkd.exchange.loss`). :func:`export_run` and :func:`import_run` do whole files.
"""

from __future__ import annotations

from agentkd.exchange.transfer import FORMATS, Exported, Imported, export_run, format_named, import_run

__all__ = ["FORMATS", "Exported", "Imported", "export_run", "format_named", "import_run"]
