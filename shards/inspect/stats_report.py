"""The figures of a shard set as tables for the terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

from shards.inspect.plots import ordered
from shards.inspect.plots_page import size
from shards.terminal import table_console
from shards.wording import and_more

NO_TRAIN = "–"
"""Shown for figures that need a train split, if there is none."""


def show(figures: dict[str, Any]) -> None:
    """Print the figures of ``shards.inspect.stats.describe`` to stdout."""
    console = table_console()
    text = figures["kind"] == "text"
    title = f"{figures['dir']} ({figures['kind']}, {figures['shards']} shards, {size(figures['bytes'])})"
    console.print(_samples(figures, title, text))
    console.print(_vocabulary(figures))
    if signers := {name for entry in figures["signers"].values() for name in entry["samples"]}:
        unseen = {split: len(entry["not_in_train"] or ()) for split, entry in figures["signers"].items()}
        unseen = {split: number for split, number in unseen.items() if number}
        known = any(entry["not_in_train"] is not None for entry in figures["signers"].values())
        console.print(f"signers: {len(signers)}; not in train: {(unseen or 'none') if known else NO_TRAIN}")
    if figures["frame_rates"]:
        console.print(f"frames per second: {_shares(figures['frame_rates'])}")
    if figures["sizes"]:
        console.print(f"pixels: {_shares(figures['sizes'])}")
    utilisation = figures["utilisation"]
    filled = ", ".join(f"{row['size']}: {row['plain']:.0%} -> {row['best']:.0%}" for row in utilisation["rows"])
    console.print(f"not padding ({utilisation['unit']}; {utilisation['plain']} -> {utilisation['best']}): {filled}")
    for split, number in figures["texts_shared_with_train"].items():
        shown = NO_TRAIN if number is None else number
        console.print(f"{split}: {shown} samples have a text that also occurs in train")


def _samples(figures: dict[str, Any], title: str, text: bool) -> Table:
    unit = "tokens" if text else "frames"
    amount = unit if text else "hours"
    title += f"; lengths in {unit}"
    names = ("split", "corpus", "samples", amount, "p50/p95/max", "words", "repeated", "signers")
    table = Table(*names, title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in table.columns[2:]:
        column.justify, column.no_wrap = "right", True
    place = {split: number for number, split in enumerate(ordered([group["split"] for group in figures["groups"]]))}
    for group in sorted(figures["groups"], key=lambda group: (place[group["split"]], group["corpus"])):
        length = "/".join(f"{group['length'][key]:.0f}" for key in ("p50", "p95", "max"))
        values = [group["split"], group["corpus"], f"{group['samples']:,}"]
        values += [f"{group['tokens']:,}" if text else f"{group['hours']:,.2f}", length]
        values += [f"{group['words']['mean']:.1f}", f"{group['repeated_texts']:,}", f"{group['signers']:,}"]
        table.add_row(*values)
    return table


def _vocabulary(figures: dict[str, Any]) -> Table:
    names = ("split", "running words", "vocabulary", "once", "not in train", "of its text")
    table = Table(*names, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    vocabulary = figures["vocabulary"]
    for split in ordered(list(vocabulary)):
        values = vocabulary[split]
        unknown = ["–", "–"]
        if split != "train" and values["unknown_vocabulary"] is not None:
            unknown = [f"{values['unknown_vocabulary']:,}", f"{values['unknown_words_fraction']:.1%}"]
        numbers = [f"{values[name]:,}" for name in ("words", "vocabulary", "singletons")]
        table.add_row(split, *numbers, *unknown)
    return table


def _shares(counts: dict[str, int], most: int = 5) -> str:
    largest = sorted(counts.items(), key=lambda item: -item[1])
    return and_more([f"{name} ({number:,})" for name, number in largest], most)
