"""The lines that READMEs of compiled clients give for one's own program compile."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tests.clients.go import FLAGS, GO
from tests.clients.java import JAVA
from tests.clients.java import built as java_built
from tests.clients.programs import build, fetch, need
from tests.guides import block

_GO = """package main

import (
	"context"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	unisonov1 "github.com/unisono/unisono/clients/go/gen/unisono/v1"
)

func call(ctx context.Context, items []*unisonov1.Item) error {
@LINES@
	_ = stream
	return err
}

func main() { _ = call }
"""
_JAVA = """
import dev.unisono.v1.*;
import io.grpc.*;
import java.util.*;

class Readme {
  static void call(List<Item> items) {
@LINES@
    events.hasNext();
  }
}
"""


def test_go(tmp_path: Path) -> None:
    """In a function that has what they take for granted; what their dots stand for returns the error."""
    need("go", for_what="the Go client")
    fetch("go", "mod", "download", folder=GO, for_what="the Go client")
    lines = block("clients/go/README.md", "connection, err :=").replace("…", "if err != nil {\nreturn err\n}")
    program, overlay = tmp_path / "main.go", tmp_path / "overlay.json"
    program.write_text(_GO.replace("@LINES@", lines))
    overlay.write_text(json.dumps({"Replace": {str(GO / "cmd" / "readme" / "main.go"): str(program)}}))
    build("go", "build", *FLAGS, "-overlay", overlay, "-o", tmp_path / "readme", "./cmd/readme", folder=GO)


def test_java(tmp_path: Path) -> None:
    """In a method that has what they take for granted, against what `mvn package` made."""
    target = java_built().parent / "target"
    program = tmp_path / "Readme.java"
    program.write_text(_JAVA.replace("@LINES@", block("clients/java/README.md", "ManagedChannel")))
    path = f"{target / 'classes'}{os.pathsep}{target / 'lib'}/*"
    build("javac", "-cp", path, "-d", tmp_path, program, folder=JAVA)
