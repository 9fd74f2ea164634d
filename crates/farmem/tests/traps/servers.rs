//! A memory server with little room: what it refuses, and what becomes of the program.

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};

use serde_json::Value;

use crate::rig::{LIMIT, Rig};

/// A `farmem serve` on a port of its own.
#[derive(Debug)]
pub(crate) struct Server<'a> {
    pub(crate) child: Child,
    pub(crate) address: String,
    rig: &'a Rig,
}

impl<'a> Server<'a> {
    pub(crate) fn start(rig: &'a Rig, memory: &str) -> Self {
        Self::start_with(rig, &["--listen", "127.0.0.1:0", "--memory", memory])
    }

    pub(crate) fn start_with(rig: &'a Rig, options: &[&str]) -> Self {
        let mut command = rig.farmem();
        command.arg("serve").args(options);
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut said = String::new();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        stderr.read_line(&mut said).unwrap();
        // The rest goes nowhere, but must not meet a closed pipe.
        std::thread::spawn(move || std::io::copy(&mut stderr, &mut std::io::sink()));
        let mut words = said.split_ascii_whitespace();
        let address = words.find(|word| word.starts_with("127.0.0.1:"));
        Self { address: address.expect(&said).to_owned(), child, rig }
    }

    /// What `farmem server show` says.
    pub(crate) fn show(&self) -> Value {
        let mut command = self.rig.farmem();
        command.args(["server", "show", "-o", "json", "--server", &self.address]);
        serde_json::from_slice(&command.output().unwrap().stdout).unwrap()
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Server<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a refusal names, besides the server: what was asked, what is free, and what to do.
const REFUSAL: [&str; 5] = ["is full", "asked for ", " bytes are free", "--memory", "--spill DIR"];

/// A program that outgrows the server is stopped with the numbers and the remedy.
#[test]
fn a_program_that_outgrows_the_server_is_stopped() {
    let Some(rig) = Rig::new() else { return };
    let server = Server::start(&rig, "64MiB");
    let options = ["--local", LIMIT, "--server", &server.address];
    let outcome = rig.run(&options, &rig.compile("grow"), &["192"]);
    outcome.was_stopped(&REFUSAL);
    outcome.was_stopped(&[&server.address]);
    outcome.has_paged();
    assert_eq!(server.show()["sessions"], 0);
}

/// A program is not even started to page where the server has no room at all.
#[test]
fn a_server_without_room_refuses_at_setup() {
    let Some(rig) = Rig::new() else { return };
    let server = Server::start(&rig, "1MiB");
    let options = ["--local", LIMIT, "--server", &server.address];
    let outcome = rig.run(&options, &rig.compile("grow"), &["192"]);
    outcome.was_stopped(&REFUSAL);
    outcome.was_stopped(&[&server.address]);
    assert_eq!(server.show()["sessions"], 0);
}

/// R1: with a directory the same program completes: what the server refuses goes there, and its
/// file is gone with the program.
#[test]
fn what_the_server_refuses_is_spilled() {
    let Some(after) = spills("64MiB") else { return };
    assert!(after["pages_written"].as_u64() > Some(1024), "{after}");
}

/// R1: also when the server has less than a program asks for at first.
#[test]
fn a_program_completes_with_less_than_one_extent_on_the_server() {
    let Some(after) = spills("32MiB") else { return };
    // What it has is used before the disk.
    assert!(after["pages_written"].as_u64() > Some(1000), "{after}");
}

/// What the server counted.
fn spills(memory: &str) -> Option<Value> {
    let rig = Rig::new()?;
    let server = Server::start(&rig, memory);
    let directory = rig.path("spilled");
    std::fs::create_dir(&directory).unwrap();
    let spill = directory.to_str().unwrap();
    let options = ["--local", LIMIT, "--server", &server.address, "--spill", spill];
    rig.run(&options, &rig.compile("grow"), &["192"]).is_right();
    assert_eq!(directory.read_dir().unwrap().count(), 0);
    let after = server.show();
    assert_eq!(after["sessions"], 0);
    Some(after)
}

/// R1, R5: each finds its own bytes.
#[test]
fn two_programs_share_a_server() {
    let Some(rig) = Rig::new() else { return };
    let Some(other) = Rig::new() else { return };
    let server = Server::start(&rig, "1GiB");
    let options = ["--local", LIMIT, "--server", &server.address];
    let program = rig.compile("grow");
    let mut first = rig.start(&options, &program, &["128"]);
    other.run(&options, &program, &["160"]).is_right();
    first.end(std::time::Duration::from_secs(60)).is_right();
    assert_eq!(server.show()["sessions"], 0);
}
