"""What can't be meant by --region, and a guidance file that is none: one sentence each, never a traceback."""

from __future__ import annotations

import pytest

from pipelines.__main__ import main
from pipelines.errors import StudioError
from tests.test_generate_command import regions


@pytest.mark.parametrize(
    "region, says",
    [
        ("cat=-0.1,0,.5,1", "is not in the picture"),
        ("cat=0.,0,1e9,1", "is not in the picture"),
        ("cat=256,0,0", "names no colour.*0 to 255"),
        ("cat=-1,0,0", "names no colour"),
        ("cat=1.5,0,0", "names no colour"),
        (f"cat={'9' * 5000},0,0", "names no colour"),
    ],
)
def test_numbers_that_are_out_of_range_are_not_taken_for_files(region: str, says: str) -> None:
    with pytest.raises(StudioError, match=says):
        regions("--region", region, "--layout", "gone.png")


def test_a_box_may_be_written_in_any_usual_way() -> None:
    layout = regions("--region", "cat=0.,+.5, 5e-1 ,1.0")
    assert int(layout.regions[0].area.mask.sum()) == 256 * 256


def test_a_folder_for_config_without_a_prompt_says_what_a_guidance_file_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--config", "folder"]) == 2
    assert "no prompt" in (said := capsys.readouterr().err) and "--config FILE.json" in said
