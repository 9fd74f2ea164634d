//! The other commands.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
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
fn a_server_tells_metrics_and_logs_for_programs() {
    let installation = Installation::new();
    let address = format!("unix:{}", installation.folder().join("s").display());
    let public = ["serve", "--listen", &address, "--memory", "8MiB", "--metrics", "0.0.0.0:0"];
    let output = output(installation.farmem(public));
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("--insecure"));

    let serve = ["serve", "--listen", &address, "--memory", "8MiB", "--metrics", "127.0.0.1:0"];
    let mut command = installation.farmem(serve.iter().chain(&["--log-form", "json"]));
    let mut server = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut log = BufReader::new(server.stderr.take().unwrap()).lines();
    let mut event = || -> Value { serde_json::from_str(&log.next().unwrap().unwrap()).unwrap() };
    let started = event();
    assert_eq!((&started["event"], &started["level"]), (&"started".into(), &"info".into()));
    assert_eq!(started["memory_bytes"], 8 << 20);
    let mut stream = TcpStream::connect(started["metrics"].as_str().unwrap()).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("\nfarmem_server_memory_bytes 8388608\n"), "{answer}");

    let mut client = UnixStream::connect(installation.folder().join("s")).unwrap();
    client.write_all(&[0x55; 80]).unwrap();
    let dropped = event();
    assert_eq!(
        (&dropped["event"], &dropped["reason"]),
        (&"client_dropped".into(), &"bad_magic".into())
    );
    let process = format!("process {}", std::process::id());
    assert_eq!(dropped["peer"], process);
    kill_process(Pid::from_child(&server), Signal::TERM).unwrap();
    assert_eq!(event()["event"], "stopped");
    assert_eq!(server.wait().unwrap().code(), Some(0));
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
    assert_eq!(
        (&json["granted"]["hello"], &json["refused"]),
        (&1.into(), &Value::Object([].into_iter().collect()))
    );
    let table = output(installation.farmem(show));
    assert!(text(&table.stdout).contains("8 MiB"), "{table:?}");
    assert!(text(&table.stdout).contains("granted: hello"), "{table:?}");
    server.kill().unwrap();
    server.wait().unwrap();
    let gone = output(installation.farmem(show));
    assert_eq!(gone.status.code(), Some(1));
    assert!(text(&gone.stderr).contains(&address), "{gone:?}");
}
