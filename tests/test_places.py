"""Folders that a power cut does not take away, and that are known from others of their name."""

from __future__ import annotations

import pytest

from finetune import artifact
from finetune.errors import CannotContinue


def test_a_folder_is_known_again_and_another_in_its_place_is_not(tmp_path):
    folder = tmp_path / "run"
    artifact.make_folder(folder / "checkpoints")
    place = artifact.Place.of(folder)
    place.refuse_another()
    folder.rename(tmp_path / "away")
    with pytest.raises(CannotContinue, match=r"run: is gone; nothing is written there"):
        place.refuse_another()
    folder.mkdir()
    with pytest.raises(CannotContinue, match=r"run: is another folder than the run began in"):
        place.refuse_another()
    folder.rmdir()
    folder.symlink_to(tmp_path / "away")
    place.refuse_another()  # the same folder by another way
    folder.unlink()
    (tmp_path / "away").rename(folder)
    place.refuse_another()


def test_new_folders_are_fsynced_in_what_they_lie_in(tmp_path, monkeypatch):
    synced = []
    real = artifact._fsync
    monkeypatch.setattr(artifact, "_fsync", lambda path: (synced.append(path), real(path)))
    artifact.make_folder(tmp_path / "a" / "b")
    assert synced == [tmp_path, tmp_path / "a"]
    artifact.make_folder(tmp_path / "a" / "b")
    assert len(synced) == 2
