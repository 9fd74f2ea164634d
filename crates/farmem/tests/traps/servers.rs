//! A memory server with little room: what it refuses, and what becomes of the program.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::rig::{LIMIT, Rig};

/// A `farmem serve` on a port of its own.
#[derive(Debug)]
pub(crate) struct Server<'a> {
    pub(crate) child: Child,
    pub(crate) address: String,
    /// What all that serve at the address write to standard error.
    said: Arc<Mutex<Vec<String>>>,
    /// Ends when the last of them has ended.
    listens: Option<JoinHandle<()>>,
    rig: &'a Rig,
}

impl<'a> Server<'a> {
    pub(crate) fn start(rig: &'a Rig, memory: &str) -> Self {
        Self::start_with(rig, &["--listen", "127.0.0.1:0", "--memory", memory])
    }

    pub(crate) fn start_with(rig: &'a Rig, options: &[&str]) -> Self {
        Self::start_in(rig, options, &[])
    }

    /// With something more in the environment.
    pub(crate) fn start_in(
        rig: &'a Rig,
        options: &[&str],
        environment: &[(&str, PathBuf)],
    ) -> Self {
        let mut command = rig.farmem();
        command.arg("serve").args(options).envs(environment.iter().cloned());
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut said = String::new();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        stderr.read_line(&mut said).unwrap();
        let mut words = said.split_ascii_whitespace();
        let address = words.find(|word| word.starts_with("127.0.0.1:")).expect(&said).to_owned();
        let all = Arc::new(Mutex::new(vec![said]));
        let said = Arc::clone(&all);
        let listens = std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                all.lock().unwrap().push(line);
            }
        });
        Self { address, child, said, listens: Some(listens), rig }
    }

    /// Waits for a line in JSON of this event, after so many others of it; returns it.
    pub(crate) fn says(&self, event: &str, after: usize) -> Value {
        let began = Instant::now();
        loop {
            let lines: Vec<Value> = {
                let said = self.said.lock().unwrap();
                said.iter().filter_map(|line| serde_json::from_str(line).ok()).collect()
            };
            let mut lines = lines.into_iter().filter(|line| line["event"] == event);
            if let Some(line) = lines.nth(after) {
                return line;
            }
            let said = &self.said;
            assert!(began.elapsed() < Duration::from_secs(60), "no {event}: {said:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until nobody serves at the address any more.
    pub(crate) fn ends(mut self) {
        self.listens.take().unwrap().join().unwrap();
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

/// What a server has left is used also where it is less than a region grows by at once.
#[test]
fn all_of_a_server_can_be_used() {
    let Some(rig) = Rig::new() else { return };
    let server = Server::start(&rig, "100MiB");
    let options = ["--local", LIMIT, "--server", &server.address];
    rig.run(&options, &rig.compile("grow"), &["96"]).is_right();
    assert_eq!(server.show()["sessions"], 0);
}

/// What is here needs no room there, though it has been out: all of it is touched again and again, in no order.
#[test]
fn what_is_here_needs_no_room_on_the_server() {
    let Some(rig) = Rig::new() else { return };
    let server = Server::start(&rig, "104MiB");
    let options = ["--local", LIMIT, "--server", &server.address];
    rig.run(&options, &rig.compile("own_processors"), &[]).is_right();
    assert_eq!(server.show()["sessions"], 0);
}

/// That a server had no more room is not believed for ever: whoever needs it asks again.
#[test]
fn room_that_another_program_gives_back_is_asked_for_again() {
    let Some(rig) = Rig::new() else { return };
    let Some(other) = Rig::new() else { return };
    let server = Server::start(&rig, "256MiB");
    let options = ["--local", LIMIT, "--server", &server.address];
    let program = rig.compile("grow_late");
    let (first_goes, then_goes) = (rig.path("first"), rig.path("then"));
    // Has three quarters of the server, so that the other one's first growth is refused.
    let mut first = other.start(&options, &program, &["100", "1", first_goes.to_str().unwrap()]);
    first.says("filled");
    let mut then = rig.start(&options, &program, &["48", "120", then_goes.to_str().unwrap()]);
    then.says("filled");
    std::fs::write(&first_goes, "").unwrap();
    first.end(Duration::from_secs(60)).is_right();
    // Longer than a refusal is believed.
    std::thread::sleep(Duration::from_millis(1_100));
    std::fs::write(&then_goes, "").unwrap();
    then.end(Duration::from_secs(60)).is_right();
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
    first.end(Duration::from_secs(60)).is_right();
    assert_eq!(server.show()["sessions"], 0);
}
