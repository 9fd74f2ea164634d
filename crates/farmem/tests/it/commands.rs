//! The other commands.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
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
    let decisive = ["kernel", "userfaultfd permission", "paging with fork events"];
    for name in decisive.into_iter().chain(["real-time priority", "io_uring"]) {
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
fn a_client_that_has_gone_already_is_named_in_the_log() {
    let installation = Installation::new();
    let serve = ["serve", "--listen", "127.0.0.1:0", "--memory", "8MiB", "--log-form", "json"];
    let mut server = installation.farmem(serve).stderr(Stdio::piped()).spawn().unwrap();
    let mut log = BufReader::new(server.stderr.take().unwrap()).lines();
    let mut event = || -> Value { serde_json::from_str(&log.next().unwrap().unwrap()).unwrap() };
    let started = event();
    let mut client = TcpStream::connect(started["listen"].as_str().unwrap()).unwrap();
    let own = client.local_addr().unwrap().to_string();
    client.write_all(&[0x55; 80]).unwrap();
    drop(client);
    let dropped = event();
    assert_eq!((&dropped["event"], &dropped["peer"]), (&"client_dropped".into(), &own.into()));
    server.kill().unwrap();
    server.wait().unwrap();
}

#[test]
fn a_listing_that_cannot_be_written_has_failed() {
    let server = Server::start(&["--memory", "8MiB"]);
    server.done(&["create", "r", "--size", "4K"]);
    let at = ["--server", &server.address];
    let region: &[&[&str]] = &[&["list"], &["list", "--json"], &["show", "r"], &["read", "r"]];
    let mut commands: Vec<Vec<&str>> =
        region.iter().map(|words| [&["region"], *words, &at].concat()).collect();
    commands.extend([
        [&["server", "show"][..], &at].concat(),
        [&["server", "show", "--json"][..], &at].concat(),
        vec!["doctor"],
        vec!["doctor", "--json"],
        vec!["completion", "bash"],
        vec!["--help"],
        vec!["run", "--help"],
    ]);
    for words in commands {
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let mut command = server.installation.farmem(&words);
        let output = command.stdout(full).stderr(Stdio::piped()).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{words:?}: {output:?}");
        let said = text(&output.stderr);
        assert!(said.starts_with("farmem: ") && said.contains("standard output"), "{said}");
        // A reader that has gone is told nothing.
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = server.installation.farmem(&words);
        let output = command.stdout(writer).stderr(Stdio::piped()).output().unwrap();
        assert_eq!((output.status.code(), text(&output.stderr)), (Some(1), ""), "{words:?}");
    }
}

#[test]
fn what_was_done_is_done_though_nobody_reads_the_note() {
    let server = Server::start(&["--memory", "8MiB"]);
    server.done(&["create", "r", "--size", "4K"]);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let pin = ["region", "pin", "r", "--server", &server.address];
    let status = server.installation.farmem(pin).stderr(writer).status().unwrap();
    assert_eq!(status.code(), Some(0));
    assert_eq!(server.json("r")["pinned_bytes"], 4096);
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

/// A server with everything, on a socket of its own.
struct Server {
    child: std::process::Child,
    address: String,
    installation: Installation,
}

impl Server {
    fn start(flags: &[&str]) -> Self {
        let installation = Installation::new();
        let address = format!("unix:{}", installation.folder().join("s").display());
        let child = Self::spawn(&installation, &address, flags);
        Self { child, address, installation }
    }

    fn spawn(installation: &Installation, address: &str, flags: &[&str]) -> std::process::Child {
        let mut command = installation.farmem(["serve", "--listen", address]);
        let mut child = command.args(flags).stderr(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stderr.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.contains("lending"), "{line}");
        child
    }

    /// Kills the process and starts another one.
    fn restart(&mut self, flags: &[&str]) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.child = Self::spawn(&self.installation, &self.address, flags);
    }

    fn region(&self, arguments: &[&str]) -> std::process::Output {
        let mut command = self.installation.farmem(["region"]);
        command.args(arguments).args(["--server", &self.address]);
        output(command)
    }

    /// What the command writes to standard output.
    fn done(&self, arguments: &[&str]) -> Vec<u8> {
        let output = self.region(arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        output.stdout
    }

    fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&self.done(&["show", name, "--json"])).unwrap()
    }

    fn write(&self, arguments: &[&str], bytes: &[u8]) {
        let mut command = self.installation.farmem(["region", "write"]);
        command.args(arguments).args(["--server", &self.address]);
        let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
        Write::write_all(&mut child.stdin.take().unwrap(), bytes).unwrap();
        assert!(child.wait().unwrap().success());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn cap_76_regions_are_made_copied_filled_and_written_back() {
    let data = tempfile::tempdir().unwrap();
    let file = data.path().join("data");
    std::fs::write(&file, vec![7; 1 << 20]).unwrap();
    let directory = data.path().to_str().unwrap();
    let tier = format!("file={directory}:64M");
    let server = Server::start(&[
        "--memory",
        "16M",
        "--tier",
        "compressed=32M",
        "--tier",
        &tier,
        "--promise-ratio",
        "100000",
        "--allow-dir",
        directory,
    ]);
    server.done(&["create", "big", "--size", "1T", "--page-size", "64K", "--fill", "255"]);
    server.write(&["big", "--offset", "4097"], b"hello");
    server.done(&["snapshot", "big", "then"]);
    server.done(&["clone", "big", "other"]);
    server.write(&["other", "--offset", "4098"], b"a");
    let at = ["--range", "4096:8"];
    assert_eq!(server.done(&[&["read", "then"], &at[..]].concat()), b"\xffhello\xff\xff");
    assert_eq!(server.done(&[&["read", "other"], &at[..]].concat()), b"\xffhallo\xff\xff");
    assert_eq!(server.json("other")["stored_bytes"], 4096);
    assert_eq!(server.json("then")["kind"], "snapshot");

    server.done(&["create", "disk", "--file", file.to_str().unwrap()]);
    server.write(&["disk", "--offset", "10000"], b"new");
    server.done(&["pin", "disk", "--range", "0:64K"]);
    let shown = server.json("disk");
    assert_eq!((&shown["dirty_bytes"], &shown["pinned_bytes"]), (&4096.into(), &65536.into()));
    server.done(&["flush", "disk"]);
    assert_eq!(std::fs::read(&file).unwrap()[9999..10004], *b"\x07new\x07");
    let refused = server.region(&["delete", "disk"]);
    assert!(text(&refused.stderr).contains("unpin"), "{refused:?}");
    server.done(&["unpin", "disk"]);
    server.done(&["delete", "disk"]);
    let listed = server.done(&["list"]);
    let names: Vec<_> = text(&listed).lines().filter_map(|line| line.split(' ').next()).collect();
    assert_eq!(names, ["NAME", "big", "then", "other"]);
    // The server says what it finds at a path that is not there for us.
    let absent = data.path().join("absent");
    let absent = ["create", "x", "--file", absent.to_str().unwrap()];
    let unknown = server.region(&absent);
    assert!(text(&unknown.stderr).contains("--size"), "{unknown:?}");
    let refused = server.region(&[&absent[..], &["--size", "4K"]].concat());
    assert!(text(&refused.stderr).contains("refused"), "{refused:?}");
    std::fs::write(&file, [7; 10_000]).unwrap();
    let odd = ["create", "odd", "--file", file.to_str().unwrap()];
    let refused = server.region(&odd);
    assert!(text(&refused.stderr).contains("last 1808 bytes"), "{refused:?}");
    server.done(&[&odd[..], &["--size", "8K"]].concat());
    server.done(&["delete", "odd"]);
    let outside = server.region(&["create", "x", "--file", "/etc/hostname", "--size", "4K"]);
    assert!(text(&outside.stderr).contains("may not use the file"), "{outside:?}");
}

#[test]
fn cap_9_cap_16_a_region_comes_from_another_server_and_goes_back_to_it() {
    let far = Server::start(&["--memory", "16M"]);
    let near = Server::start(&["--memory", "16M", "--promise-ratio", "10"]);
    far.done(&["create", "original", "--size", "4M", "--fill", "7"]);
    far.write(&["original", "--offset", "1M"], b"from afar");
    let from = format!("server:{}/original", far.address);
    near.done(&["create", "copy", "--from", &from]);
    near.done(&["create", "backed", "--file", &from, "--offset", "1M", "--size", "1M"]);
    let at = ["--range", "1048575:10"];
    assert_eq!(near.done(&[&["read", "copy"], &at[..]].concat()), b"\x07from afar");
    let shown = near.json("copy");
    assert_eq!((&shown["kind"], &shown["source"]), (&"server".into(), &from.as_str().into()));
    assert_eq!((&shown["size_bytes"], &shown["stored_bytes"]), (&(4 << 20).into(), &8192.into()));
    near.done(&["prefetch", "copy", "--range", "0:2M"]);
    assert_eq!(near.json("copy")["stored_bytes"], 2 << 20);
    // What is written goes back, and only by a flush.
    near.write(&["backed", "--offset", "5"], b"near");
    let there = ["read", "original", "--range", "1M:10"];
    assert_eq!(far.done(&there), b"from afar\x07");
    near.done(&["flush", "backed"]);
    assert_eq!(far.done(&there), b"from near\x07");
    let refused = near.region(&["flush", "copy"]);
    assert!(!refused.status.success(), "{refused:?}");
    // Away: what is not here yet is refused, and what is here stays.
    drop(far);
    let refused = near.region(&["read", "copy", "--range", "3M:4K"]);
    assert_eq!((refused.status.code(), &refused.stdout[..]), (Some(1), &b""[..]));
    assert!(text(&refused.stderr).contains("does not give"), "{refused:?}");
    assert_eq!(near.done(&[&["read", "copy"], &at[..]].concat()), b"\x07from afar");
    for wrong in ["server:x", "server:h:1/", "elsewhere", "server:/r"] {
        let refused = near.region(&["create", "x", "--from", wrong, "--size", "4K"]);
        assert!(text(&refused.stderr).contains("server:ADDR/REGION"), "{refused:?}");
    }
}

#[test]
fn cap_14_cap_72_regions_are_resized_and_kept_in_a_tier() {
    let server = Server::start(&["--memory", "16M", "--tier", "compressed=32M"]);
    server.done(&["create", "r", "--size", "1M", "--tier-preference", "compressed"]);
    assert_eq!(server.json("r")["tier_preference"], "compressed");
    server.write(&["r"], &[1; 1 << 20]);
    let began = std::time::Instant::now();
    while server.json("r")["compressed_bytes"] != 1 << 20 {
        assert!(began.elapsed().as_secs() < 30, "{:?}", server.json("r"));
    }
    assert!(text(&server.done(&["show", "r", "-o", "table"])).contains("prefers compressed"));
    server.done(&["prefer", "r", "dram", "--range", "0:512K"]);
    assert_eq!(server.json("r")["tier_preference"], "mixed");
    server.done(&["prefer", "r", "none"]);
    assert_eq!(server.json("r")["tier_preference"], "none");
    let refused = server.region(&["prefer", "r", "file"]);
    assert!(text(&refused.stderr).contains("without such a tier"), "{refused:?}");
    let refused = server.region(&["create", "x", "--size", "4K", "--tier-preference", "tape"]);
    assert!(text(&refused.stderr).contains("dram, compressed or file"), "{refused:?}");

    server.done(&["resize", "r", "8M"]);
    server.write(&["r", "--offset", "7M"], b"end");
    assert_eq!(server.done(&["read", "r", "--range", "7M:4"]), b"end\0");
    server.done(&["resize", "r", "512K"]);
    assert_eq!(server.json("r")["size_bytes"], 512 << 10);
    assert_eq!(server.done(&["read", "r", "--range", "524287:1"]), [1]);
    for (arguments, why) in [
        (&["read", "r", "--range", "512K:4K"][..], "outside of the region"),
        (&["resize", "r", "1T"], "is full"),
        (&["resize", "r", "5000"], "makes no sense"),
        (&["invalidate", "r", "--range", "512K:0"], "freed before"),
    ] {
        let refused = server.region(arguments);
        assert_eq!(refused.status.code(), Some(1), "{arguments:?}: {refused:?}");
        assert!(text(&refused.stderr).contains(why), "{arguments:?}: {refused:?}");
    }
    server.done(&["clone", "r", "copy"]);
    let refused = server.region(&["delete", "r"]);
    assert!(text(&refused.stderr).contains("has copies"), "{refused:?}");
    server.done(&["delete", "r", "--keep-copies"]);
    assert_eq!(server.done(&["read", "copy", "--range", "0:2"]), [1, 1]);
}

/// Memory to memory, block to block, server to server, memory to file and back: each is the region as
/// it was, thin where it was thin, and nothing else is left behind.
#[test]
fn cap_74_regions_are_copied_within_a_server_to_another_one_and_to_a_file_and_back() {
    let data = tempfile::tempdir().unwrap();
    let directory = data.path().canonicalize().unwrap();
    let flags = ["--memory", "64M", "--promise-ratio", "100", "--allow-dir"];
    let flags = [&flags[..], &[directory.to_str().unwrap()]].concat();
    let (server, other) = (Server::start(&flags), Server::start(&flags));
    let content: Vec<u8> = (0..3_000_000_u32).map(|at| (at / 7 % 251) as u8).collect();
    server.done(&["create", "big", "--size", "128M", "--page-size", "64K"]);
    server.write(&["big", "--offset", "12345"], &content);
    server.write(&["big", "--offset", "134217724"], b"last");
    let is_same = |on: &Server, name: &str| {
        let range = format!("12345:{}", content.len());
        assert!(on.done(&["read", name, "--range", &range]) == content, "{name}");
        assert_eq!(on.done(&["read", name, "--range", "134217722:6"]), b"\0\0last");
        assert_eq!(on.json(name)["size_bytes"], 128 << 20, "{name}");
        assert!(on.json(name)["stored_bytes"].as_u64() < Some(16 << 20), "{name} is thin");
    };
    server.done(&["copy", "big", "second"]);
    is_same(&server, "second");
    server.done(&["copy", "big", "there", "--to-server", &other.address]);
    is_same(&other, "there");
    // The copy is of its own.
    server.write(&["big", "--offset", "12345"], b"changed");
    is_same(&server, "second");
    is_same(&other, "there");
    // A part of it, to another place of a region that holds something else.
    other.done(&["create", "part", "--size", "8M", "--fill", "9"]);
    let part = ["copy", "second", "part", "--range", "12345:100000", "--to-offset", "4099"];
    server.done(&[&part[..], &["--to-server", &other.address]].concat());
    let found = other.done(&["read", "part", "--range", "4098:100002"]);
    assert!(found[1..100_001] == content[..100_000] && found[0] == 9 && found[100_001] == 9);
    let beyond = ["copy", "second", "part", "--range", "12345:100000000", "--to-server"];
    let beyond = server.region(&[&beyond[..], &[&other.address]].concat());
    assert!(!beyond.status.success(), "{beyond:?}");
    // To a file, and back on another server, under a name that is free or taken.
    let backup = directory.join("backup");
    let backup = backup.to_str().unwrap();
    server.done(&["backup", "second", backup]);
    other.done(&["restore", backup, "back"]);
    is_same(&other, "back");
    let taken = other.region(&["restore", backup, "part"]);
    assert!(!taken.status.success(), "{taken:?}");
    other.done(&["restore", backup, "part", "--replace"]);
    is_same(&other, "part");
    for (on, expected) in [(&server, &["big", "second"][..]), (&other, &["back", "part", "there"])]
    {
        let listed = on.done(&["list"]);
        let names = text(&listed);
        let mut names: Vec<_> = names.lines().filter_map(|line| line.split(' ').next()).collect();
        names.sort_unstable();
        let mut expected = [&["NAME"], expected].concat();
        expected.sort_unstable();
        assert_eq!(names, expected);
    }
}

/// A region of zeros that is copied for hours: it is thin, and each byte of it is looked at.
#[test]
fn an_interrupted_copy_leaves_nothing_behind() {
    let server = Server::start(&["--memory", "16M", "--promise-ratio", "10000000"]);
    let name = "n".repeat(255);
    server.done(&["create", &name, "--size", "16T"]);
    let names = || -> Vec<String> {
        let listed: Value = serde_json::from_slice(&server.done(&["list", "--json"])).unwrap();
        let regions = listed.as_array().unwrap().iter();
        regions.map(|region| region["name"].as_str().unwrap().to_owned()).collect()
    };
    for (signal, number) in [(Signal::INT, 2), (Signal::TERM, 15)] {
        let words = ["region", "copy", &name, &"t".repeat(255), "--server", &server.address];
        let mut command = server.installation.farmem(words);
        let mut copy = command.stderr(Stdio::piped()).spawn().unwrap();
        while !names().iter().any(|name| name.contains("in the making")) {
            assert!(copy.try_wait().unwrap().is_none(), "it has ended");
        }
        kill_process(Pid::from_child(&copy), signal).unwrap();
        let output = copy.wait_with_output().unwrap();
        assert_eq!(output.status.signal(), Some(number), "{output:?}");
        assert_eq!(text(&output.stderr), "farmem: interrupted\n");
        assert_eq!(names(), std::slice::from_ref(&name));
    }
}

/// Two regions over one file, of which one is copied into the other.
#[test]
fn cap_22_parent_and_child_are_different_parts_of_one_file_and_both_are_written_back() {
    const MIB: usize = 1 << 20;
    let data = tempfile::tempdir().unwrap();
    let directory = data.path().canonicalize().unwrap();
    let file = directory.join("file");
    let mut model: Vec<u8> = (0..2 * MIB).map(|at| (at / 4096) as u8).collect();
    std::fs::write(&file, &model).unwrap();
    let file = file.to_str().unwrap();
    let server = Server::start(&["--memory", "16M", "--allow-dir", directory.to_str().unwrap()]);
    let create = |name, offset| {
        let place = ["--file", file, "--size", "1M", "--offset", offset];
        server.done(&[&["create", name][..], &place].concat());
    };
    create("parent", "0");
    create("child", "1M");
    server.write(&["parent", "--offset", "64K"], &[1; 5000]);
    server.done(&["copy", "parent", "child"]);
    model[64 << 10..(64 << 10) + 5000].fill(1);
    model.copy_within(..MIB, MIB);
    server.write(&["parent", "--offset", "4K"], &[2; 300]);
    server.write(&["child", "--offset", "4K"], &[3; 200]);
    model[4096..4396].fill(2);
    model[MIB + 4096..MIB + 4296].fill(3);
    for name in ["parent", "child"] {
        server.done(&["flush", name]);
        server.done(&["delete", name]);
    }
    assert!(std::fs::read(file).unwrap() == model);
    create("parent", "0");
    create("child", "1M");
    assert!(server.done(&["read", "parent"]) == model[..MIB]);
    assert!(server.done(&["read", "child"]) == model[MIB..]);
}

#[test]
fn cap_22_cap_30_a_clone_has_a_range_of_its_parents_file_and_both_outlive_the_server() {
    const MIB: usize = 1 << 20;
    let data = tempfile::tempdir().unwrap();
    let directory = data.path().canonicalize().unwrap();
    let file = directory.join("file");
    let mut model: Vec<u8> = (0..3 * MIB).map(|at| (at / 4096) as u8).collect();
    std::fs::write(&file, &model).unwrap();
    let (file, store) = (file.to_str().unwrap(), directory.join("data"));
    let allowed = ["--allow-dir", directory.to_str().unwrap()];
    let flags = [&["--memory", "16M", "--data", store.to_str().unwrap()][..], &allowed].concat();
    let mut server = Server::start(&flags);
    let parent = ["create", "parent", "--file", file, "--size", "1M", "--tier-preference", "dram"];
    server.done(&parent);
    server.write(&["parent", "--offset", "64K"], &[1; 5000]);
    let refused = server.region(&["clone", "parent", "child", "--file-offset", "1020K"]);
    let expected = "region parent has 0 to 1048576; choose an offset";
    assert!(text(&refused.stderr).contains(expected), "{refused:?}");
    let refused = server.region(&["clone", "parent", "child", "--file-offset", "1025K"]);
    assert!(text(&refused.stderr).contains("multiple"), "{refused:?}");
    server.done(&["clone", "parent", "child", "--file-offset", "1M"]);
    assert!(std::fs::read(file).unwrap() == model, "nothing is written by that");
    assert_eq!(server.json("child")["is_unfilled"], true);
    server.write(&["parent", "--offset", "4K"], &[2; 300]);
    server.write(&["child", "--offset", "4K"], &[3; 200]);
    server.done(&["flush", "parent"]);
    server.done(&["prefer", "parent", "none", "--range", "0:512K"]);
    let shown = ["parent", "child"].map(|name| server.json(name));
    server.restart(&flags);
    assert_eq!(["parent", "child"].map(|name| server.json(name)), shown);
    assert_eq!(shown[1]["is_unfilled"], true);
    // The child has never read this page, and still counts on the parent's range.
    server.write(&["parent", "--offset", "128K"], &[6; 300]);
    server.done(&["flush", "parent"]);
    server.done(&["flush", "child"]);
    model[64 << 10..(64 << 10) + 5000].fill(1);
    model.copy_within(..MIB, MIB);
    model[4096..4396].fill(2);
    model[128 << 10..(128 << 10) + 300].fill(6);
    model[MIB + 4096..MIB + 4296].fill(3);
    assert!(std::fs::read(file).unwrap() == model);
    server.write(&["child", "--offset", "9000"], &[4; 10]);
    server.restart(&flags);
    assert!(server.done(&["read", "parent"]) == model[..MIB]);
    model[MIB + 9000..MIB + 9010].fill(4);
    assert!(server.done(&["read", "child"]) == model[MIB..2 * MIB]);
    let shown = server.json("child");
    assert_eq!((&shown["is_unfilled"], &shown["dirty_bytes"]), (&false.into(), &4096.into()));
    server.done(&["flush", "child"]);
    assert!(std::fs::read(file).unwrap() == model);
    // A server that knows nothing of it finds both in the file.
    drop(server);
    let server = Server::start(&[&["--memory", "16M"][..], &allowed].concat());
    for (name, offset) in [("parent", "0"), ("child", "1M")] {
        let place = ["--file", file, "--size", "1M", "--offset", offset];
        server.done(&[&["create", name][..], &place].concat());
    }
    assert!(server.done(&["read", "parent"]) == model[..MIB]);
    assert!(server.done(&["read", "child"]) == model[MIB..2 * MIB]);
}
