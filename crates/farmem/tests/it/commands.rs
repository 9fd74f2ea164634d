//! The other commands.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::installation::{Installation, output, text};

#[test]
fn doctor_names_what_it_found_and_fails_where_something_decisive_is_missing() {
    let installation = Installation::new();
    let findings = |installation: &Installation| {
        let output = output(installation.farmem(["doctor", "-o", "json"]));
        let json: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(json["works"], output.status.success());
        json
    };
    let json = findings(&installation);
    let checks = json["checks"].as_array().unwrap();
    for check in checks {
        for field in ["check", "found", "needed", "remedy"] {
            assert!(check[field].is_string(), "{check}");
        }
        let remedied = check["status"] == "ok" || check["remedy"] != "";
        assert!(remedied, "{check}");
    }
    for name in ["kernel", "userfaultfd permission", "paging with fork events", "io_uring"] {
        assert!(checks.iter().any(|check| check["check"] == name), "{name}");
    }
    std::fs::remove_file(installation.folder().join("farmem-pagerd")).unwrap();
    let json = findings(&installation);
    assert_eq!(json["works"], false);
    let output = output(installation.farmem(["doctor"]));
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stdout).contains("FAIL    preload library and pager"));
}

#[test]
fn a_public_address_is_refused_without_insecure() {
    let installation = Installation::new();
    let output = output(installation.farmem(["serve", "--listen", "0.0.0.0:0", "--memory", "1M"]));
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("--insecure"));
}

#[test]
fn a_server_says_where_it_is_and_stops_in_order_when_told() {
    let installation = Installation::new();
    for signal in [Signal::TERM, Signal::INT] {
        let socket = installation.folder().join("s");
        let address = format!("unix:{}", socket.display());
        let mut command = installation.farmem(["serve", "--listen", &address, "--memory", "8MiB"]);
        let mut server = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(server.stderr.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.contains("8 MiB") && line.contains(&address), "{line}");
        assert!(socket.exists());
        kill_process(Pid::from_child(&server), signal).unwrap();
        assert_eq!(server.wait().unwrap().code(), Some(0));
        assert!(!socket.exists());
    }
}

#[test]
fn wrong_usage_ends_with_2_and_help_with_0() {
    let installation = Installation::new();
    for (arguments, status) in [
        (&["frobnicate"][..], 2),
        (&["serve", "--memory", "x"], 2),
        (&["--help"], 0),
        (&["run", "--help"], 0),
        (&["--version"], 0),
    ] {
        assert_eq!(output(installation.farmem(arguments)).status.code(), Some(status));
    }
}

#[test]
fn a_server_shows_what_it_lends() {
    let installation = Installation::new();
    let address = format!("unix:{}", installation.folder().join("s").display());
    let mut command = installation.farmem(["serve", "--listen", &address, "--memory", "8MiB"]);
    let mut server = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(server.stderr.take().unwrap()).read_line(&mut line).unwrap();
    let show = ["server", "show", "--server", &address];
    let json = output(installation.farmem(show.iter().chain(&["-o", "json"])));
    let json: Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(json["memory_bytes"], 8 << 20);
    assert_eq!((&json["used_bytes"], &json["sessions"]), (&0.into(), &0.into()));
    let table = output(installation.farmem(show));
    assert!(text(&table.stdout).contains("8 MiB"), "{table:?}");
    server.kill().unwrap();
    server.wait().unwrap();
    let gone = output(installation.farmem(show));
    assert_eq!(gone.status.code(), Some(1));
    assert!(text(&gone.stderr).contains(&address), "{gone:?}");
}
