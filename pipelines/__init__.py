"""Attune's engine. `studio` and `app.py` import only what is listed here; names load on first use."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from pipelines.errors import check_python

check_python(sys.version_info[:2])

_WHERE = {
    "StudioError": "errors",
    "Progress": "events",
    "Preview": "events",
    "Heatmap": "events",
    "Snapshot": "events",
    "Note": "events",
    "Finished": "events",
    "Event": "events",
    "Subject": "concept",
    "Concept": "concept",
    "Trained": "concept",
    "TrainParams": "params",
    "method_names": "methods",
    "get_method": "methods",
    "Setting": "settings",
    "parse_settings": "settings",
    "fields": "settings",
    "read_preset": "preset",
    "save_preset": "preset",
    "presets": "preset",
    "load_preset": "preset",
    "Workspace": "workspace",
    "EventLog": "eventlog",
    "read_events": "eventlog",
    "JobRecord": "joblog",
    "history": "joblog",
    "living": "joblog",
    "write_record": "joblog",
    "new_id": "files",
    "clean_name": "files",
    "write_atomic": "files",
    "Photo": "photos",
    "load_photos": "photos",
    "tokenize": "text",
    "validated": "settings",
    "load_model": "model",
    "Model": "model",
    "Library": "library",
    "overlay": "attention.heatmap",
    "atlas": "attention.heatmap",
    "palette": "attention.heatmap",
    "AttentionStore": "attention.store",
    "train_concept": "runs",
    "unfinished": "stopped",
    "discard": "stopped",
    "make_pictures": "results",
    "Request": "request",
    "usual_guidance": "request",
    "check_base": "library",
    "named_subjects": "naming",
    "import_original": "incoming",
    "is_locked": "files",
    "Entry": "concept_folder",
    "SCHEDULERS": "schedulers",
    "colour": "attention.heatmap",
    "load_npz": "attention.archive",
    "read_picture": "pictures",
    "again": "recipe",
    "Result": "gallery",
    "list_results": "gallery",
    "read_result": "gallery",
    "delete_result": "gallery",
    "zip_results": "gallery",
    "check_id": "files",
    "prune": "joblog",
    "Layout": "layout",
    "Region": "layout",
    "Area": "layout",
    "Config": "formats.cones_config",
    "read_config": "formats.cones_config",
    "config_request": "configs",
    "problems": "preset",
    "Wish": "mask_files",
    "noun_masks": "mask_files",
    "discovered_masks": "mask_files",
    "load_segmenter": "segmenter",
    "EMBEDDED": "segmenter",
    "class_pictures_of": "formats.mudi",
    "read_dataset": "formats.mudi",
    "subjects_of": "formats.mudi",
    "unpack": "formats.mudi_folders",
    "StartNoise": "cutouts",
    "cutouts_of": "cutouts",
    "chosen": "cutouts",
    "cut_out": "collage",
    "counted_prompt": "mixers",
    "relative_sizes": "mixers",
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'pipelines' has no attribute {name!r}")
    return getattr(importlib.import_module(f"pipelines.{_WHERE[name]}"), name)
