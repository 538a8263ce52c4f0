"""The button on a task's page that leads to HeyGen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import BaseOperatorLink

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import BaseOperator


class HeyGenDashboardLink(BaseOperatorLink):
    """
    Lead to HeyGen's dashboard, which shows the overdub under its title (vendor's page, "title").

    There is no link to the overdub itself: HeyGen documents no page of a single one, and the presigned link
    to its video is a secret that expires, while Airflow stores what is given here.
    """

    name = "HeyGen dashboard"

    def get_link(self, operator: BaseOperator, *, ti_key: Any) -> str:  # noqa: ARG002
        """Give the address of the dashboard."""
        return "https://app.heygen.com/"
