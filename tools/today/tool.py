"""Today's date."""

from datetime import date

from smolagents import Tool


class TodayTool(Tool):
    """Tells the date on the host, which model-written code in a sandbox cannot be trusted to know."""

    name = "today"
    description = "Returns today's date as YYYY-MM-DD."
    inputs: dict[str, dict[str, str]] = {}
    output_type = "string"

    def forward(self) -> str:
        return date.today().isoformat()
