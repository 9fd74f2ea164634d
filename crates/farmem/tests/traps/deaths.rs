//! Each part of a run is killed while most of the program's memory is out. The program stops, with
//! a reason that a person can act on, and never sees a wrong byte.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::rig::{LIMIT, Rig, Running, ends_within, pid_of};
use crate::servers::Server;

/// What a part's death takes to be noticed, told, and acted on.
const SECOND: Duration = Duration::from_secs(1);

/// The processes of a run that has paged.
struct Cast<'a> {
    running: Running<'a>,
    supervisor: Pid,
    program: Pid,
    pager: Pid,
}

impl<'a> Cast<'a> {
    /// Starts a program, and waits until it has used all its memory.
    fn new(rig: &'a Rig, options: &[&str], way: &str) -> Self {
        let options = [&["--local", LIMIT], options].concat();
        let program = rig.compile("endless");
        let mut running = rig.start(&options, &program, &[way]);
        running.says("filled");
        let supervisor = pid_of(&running.child);
        let program = child_named(supervisor, "endless");
        // What it filled is not here: so it is out.
        let here = resident_kib(program);
        assert!(here < 96 << 10, "{here} KiB of 128 MiB are here");
        Self { pager: child_named(supervisor, "farmem-pagerd"), running, supervisor, program }
    }

    /// The farmem that `farmem run` starts for itself.
    fn private_server(&self) -> Pid {
        child_named(self.supervisor, "farmem")
    }
}

/// The only child of that name. A watcher that was made just now still has its program's name: it is
/// waited for.
#[track_caller]
fn child_named(parent: Pid, name: &str) -> Pid {
    let until = Instant::now() + 5 * SECOND;
    loop {
        let found = children_named(parent, name);
        if let [child] = found[..] {
            return child;
        }
        assert!(Instant::now() < until, "children named {name}: {found:?}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn children_named(parent: Pid, name: &str) -> Vec<Pid> {
    let parent = parent.as_raw_pid();
    let list = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap();
    let named = |pid: &&str| {
        let found = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        found.trim_end() == name
    };
    let found = list.split_ascii_whitespace().filter(named);
    found.filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect()
}

fn resident_kib(pid: Pid) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", pid.as_raw_pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let number = line.unwrap().split_ascii_whitespace().next().unwrap();
    number.parse().unwrap()
}

#[track_caller]
fn kill(pid: Pid, signal: Signal) {
    kill_process(pid, signal).unwrap();
}

/// R1, R6: nobody can bring the pages back.
#[test]
fn a_killed_private_server_stops_the_program() {
    let Some(rig) = Rig::new() else { return };
    let mut cast = Cast::new(&rig, &[], "busy");
    kill(cast.private_server(), Signal::KILL);
    let outcome = cast.running.end(SECOND);
    outcome.was_stopped(&["lost", "server", "endless"]);
    outcome.has_paged();
}

/// R1, R6: the same over TCP, where the name of the server is told.
#[test]
fn a_killed_server_stops_the_program() {
    let Some(rig) = Rig::new() else { return };
    let mut server = Server::start(&rig, "1GiB");
    let address = server.address.clone();
    let mut cast = Cast::new(&rig, &["--server", &address], "busy");
    server.kill();
    let outcome = cast.running.end(SECOND);
    outcome.was_stopped(&["lost memory server", &address, "region"]);
    outcome.has_paged();
}

/// R6: also when the program touches nothing that is out, so that nobody asks the server.
#[test]
fn a_killed_server_stops_an_idle_program() {
    let Some(rig) = Rig::new() else { return };
    let mut server = Server::start(&rig, "1GiB");
    let address = server.address.clone();
    let mut cast = Cast::new(&rig, &["--server", &address], "idle");
    server.kill();
    let outcome = cast.running.end(SECOND);
    outcome.was_stopped(&["lost memory server", &address, "region"]);
    outcome.has_paged();
}

/// R1, cap 95: a server that keeps its data is waited for, and another process goes on where it was
/// killed.
#[test]
fn cap_95_a_program_survives_a_server_that_is_killed_and_started_again() {
    let Some(rig) = Rig::new() else { return };
    let data = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let data = data.path().join("data");
    let start = |address: &str| {
        let data = data.to_str().unwrap();
        Server::start_with(&rig, &["--listen", address, "--memory", "1GiB", "--data", data])
    };
    let mut server = start("127.0.0.1:0");
    let address = server.address.clone();
    let mut cast = Cast::new(&rig, &["--server", &address], "busy");
    for _ in 0..3 {
        server.kill();
        server = start(&address);
        assert!(!ends_within(cast.program, SECOND / 2));
    }
    kill(cast.supervisor, Signal::TERM);
    let outcome = cast.running.end(5 * SECOND);
    assert!(!outcome.stderr.contains("wrong"), "{outcome:?}");
    outcome.has_paged();
    drop(server);
}

/// Cap 95: SIGUSR2 has another process go on, again and again, with all that programs have out in
/// memory alone: they run on, and nothing of it is lost. A successor that cannot go on changes
/// nothing.
#[test]
fn cap_95_a_program_survives_servers_that_hand_over() {
    let Some(rig) = Rig::new() else { return };
    let options = ["--listen", "127.0.0.1:0", "--memory", "1GiB", "--log-form", "json"];
    let folder = rig.path("allowed");
    fs::create_dir(&folder).unwrap();
    let options = [&options[..], &["--allow-dir", folder.to_str().unwrap()]].concat();
    let manager = UnixDatagram::bind(rig.path("manager")).unwrap();
    let environment = [("NOTIFY_SOCKET", rig.path("manager"))];
    let mut server = Server::start_in(&rig, &options, &environment);
    let address = server.address.clone();
    let mut cast = Cast::new(&rig, &["--server", &address], "busy");
    let mut serves = pid_of(&server.child);
    let before = server.says("started", 0);
    for round in 1..=5 {
        kill(serves, Signal::USR2);
        let now = server.says("started", round);
        server.says("handed_over", round - 1);
        assert_eq!(now["incarnation"], before["incarnation"]);
        serves = Pid::from_raw(i32::try_from(now["pid"].as_i64().unwrap()).unwrap()).unwrap();
        if round == 1 {
            assert!(server.child.wait().unwrap().success(), "the first one ends in order");
        }
        assert!(!ends_within(cast.program, SECOND / 2));
        assert!(server.show()["sessions"] == 1);
    }
    // The service manager knows of each of them.
    let mut last = String::new();
    for _ in 0..6 {
        let mut told = [0; 100];
        let length = manager.recv(&mut told).unwrap();
        last = String::from_utf8_lossy(&told[..length]).into_owned();
    }
    assert_eq!(last, format!("READY=1\nMAINPID={}", serves.as_raw_pid()));
    // A successor that does not start: the one that is there serves on.
    fs::remove_dir(&folder).unwrap();
    kill(serves, Signal::USR2);
    server.says("successor_failed", 0);
    assert!(!ends_within(cast.program, SECOND / 2));
    kill(cast.supervisor, Signal::TERM);
    let outcome = cast.running.end(5 * SECOND);
    assert!(!outcome.stderr.contains("wrong"), "{outcome:?}");
    outcome.has_paged();
    kill(serves, Signal::TERM);
    server.says("stopped", 0);
    server.ends();
}

/// R6: a server that is stopped for a while is waited for, and the program goes on.
#[test]
fn a_stopped_server_is_waited_for() {
    let Some(rig) = Rig::new() else { return };
    let server = Server::start(&rig, "1GiB");
    let mut cast = Cast::new(&rig, &["--server", &server.address], "busy");
    kill(pid_of(&server.child), Signal::STOP);
    let ended = ends_within(cast.program, 2 * SECOND);
    kill(pid_of(&server.child), Signal::CONT);
    assert!(!ended && !ends_within(cast.program, SECOND));
    kill(cast.supervisor, Signal::TERM);
    let outcome = cast.running.end(5 * SECOND);
    assert!(!outcome.stderr.contains("wrong"), "{outcome:?}");
    outcome.has_paged();
}

/// R1: a pager that lives and does nothing holds the program up, for as long as it does so, and no byte
/// is made up meanwhile.
#[test]
fn u2_a_stopped_pager_is_waited_for() {
    let Some(rig) = Rig::new() else { return };
    let mut cast = Cast::new(&rig, &[], "busy");
    kill(cast.pager, Signal::STOP);
    let ended = ends_within(cast.program, 2 * SECOND);
    kill(cast.pager, Signal::CONT);
    assert!(!ended && !ends_within(cast.program, SECOND));
    kill(cast.supervisor, Signal::TERM);
    let outcome = cast.running.end(5 * SECOND);
    assert!(!outcome.stderr.contains("wrong"), "{outcome:?}");
    outcome.has_paged();
}

/// R1 (u1): the descriptor whose last close would turn faults into zeros lives in two processes.
#[test]
fn u1_a_killed_pager_stops_the_program() {
    let Some(rig) = Rig::new() else { return };
    let mut cast = Cast::new(&rig, &[], "busy");
    kill(cast.pager, Signal::KILL);
    cast.running.end(SECOND).was_stopped(&["lost the pager of endless"]);
}

/// R6: a forked child with a pager of its own would wait for ever for what it has inherited.
#[test]
fn a_killed_pager_stops_forked_children_that_have_pagers_too() {
    let Some(rig) = Rig::new() else { return };
    let program = rig.compile("fork_paged");
    let mut running = rig.start(&["--local", LIMIT], &program, &[]);
    running.says("filled");
    let supervisor = pid_of(&running.child);
    let pager = child_named(supervisor, "farmem-pagerd");
    kill(child_named(supervisor, "fork_paged"), Signal::USR1);
    let said = running.says("child ");
    let child = Pid::from_raw(said.split(' ').nth(1).unwrap().parse().unwrap()).unwrap();
    kill(pager, Signal::KILL);
    assert!(ends_within(child, SECOND), "the child lives");
    running.end(SECOND).was_stopped(&["lost the pager of fork_paged", "its forked child"]);
}

/// R1, R6: the pager that a forked child is about to have is killed, at another moment each time: before it
/// is told what its program is, while the child is written down, when it has taken over. The child goes
/// on with its parent's pager, or is stopped; it never reads a wrong byte, and nobody waits for ever.
#[test]
fn a_pager_killed_while_it_takes_a_child_over_harms_nobody() {
    let Some(rig) = Rig::new() else { return };
    let program = rig.compile("fork_inherits");
    let mut went_on = 0;
    for delay in 0..12 {
        let mut running = rig.start(&["--local", LIMIT], &program, &[]);
        running.says("filled");
        let supervisor = pid_of(&running.child);
        let first = child_named(supervisor, "farmem-pagerd");
        kill(child_named(supervisor, "fork_inherits"), Signal::USR1);
        let until = Instant::now() + 20 * SECOND;
        let heir = loop {
            let pagers = children_named(supervisor, "farmem-pagerd");
            if let Some(&heir) = pagers.iter().find(|&&pager| pager != first) {
                break Some(heir);
            }
            if Instant::now() > until || ends_within(supervisor, Duration::ZERO) {
                break None;
            }
        };
        if let Some(heir) = heir {
            thread::sleep(Duration::from_millis(delay * delay / 2));
            // It may have ended with the child.
            let _ = kill_process(heir, Signal::KILL);
        }
        let outcome = running.end(100 * SECOND);
        assert!(!outcome.stderr.contains("wrong"), "after {delay}: {outcome:?}");
        match outcome.status.code() {
            Some(0) => went_on += u32::from(outcome.stdout.contains("found everything")),
            Some(125) => assert!(outcome.stderr.contains("lost the pager"), "{outcome:?}"),
            _ => panic!("after {delay}: {outcome:?}"),
        }
        let _ = fs::remove_file(rig.path("stats"));
    }
    // Those that were killed early enough.
    assert!(went_on > 0, "no child went on");
}

/// R6: a program whose watcher is killed is not held to the limit any more, which is told.
#[test]
fn a_killed_watcher_is_told() {
    let Some(rig) = Rig::new() else { return };
    let mut running = rig.start(&["--local", LIMIT], std::path::Path::new("/bin/sleep"), &["2"]);
    let supervisor = pid_of(&running.child);
    // Until it has its name.
    let watcher = loop {
        if let Some(pid) = children_named(supervisor, "farmem-watcher").pop() {
            break pid;
        }
    };
    kill(watcher, Signal::KILL);
    let outcome = running.end(10 * SECOND);
    assert!(outcome.status.success(), "{outcome:?}");
    assert!(
        outcome.stderr.contains("watcher") && outcome.stderr.contains("unpaged"),
        "{outcome:?}"
    );
}

/// A run of a program that fills four times its limit once it may, and whose supervisor is stopped until
/// then: its pager calls in vain.
fn late_supervisor(rig: &Rig) -> Late {
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mkfifoat(rustix::fs::CWD, rig.path("go"), mode).unwrap();
    let mut command = rig.farmem();
    // One image without children: the end of another watcher would be told of instead of the pager's.
    command.args(["run", "--local", LIMIT, "--"]).arg(rig.compile("fill_when_told"));
    command.stdout(fs::File::create(rig.path("stdout")).unwrap());
    command.stderr(fs::File::create(rig.path("stderr")).unwrap());
    let late = Late(command.spawn().unwrap());
    wait_for_text(rig, "stdout", "ready");
    kill(pid_of(&late.0), Signal::STOP);
    fs::write(rig.path("go"), "\n").unwrap();
    late
}

/// Leaves nothing of a test that failed.
struct Late(std::process::Child);

impl Drop for Late {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[track_caller]
fn wait_for_text(rig: &Rig, file: &str, text: &str) {
    let until = Instant::now() + 60 * SECOND;
    while !fs::read_to_string(rig.path(file)).unwrap().contains(text) {
        let all = fs::read_to_string(rig.path("stderr")).unwrap();
        assert!(Instant::now() < until, "no `{text}` in {file}: {all}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// R6: a supervisor that does not answer holds nobody up for longer than a pager may, and tells of it when it
/// goes on.
#[test]
fn a_supervisor_that_answers_late_holds_nobody_up_and_tells() {
    let Some(rig) = Rig::new() else { return };
    let mut late = late_supervisor(&rig);
    let began = Instant::now();
    wait_for_text(&rig, "stdout", "filled");
    assert!(began.elapsed() < 4 * SECOND, "{:?}", began.elapsed());
    let supervisor = pid_of(&late.0);
    let ended = ends_within(supervisor, 7 * SECOND);
    kill(supervisor, Signal::CONT);
    wait_for_text(&rig, "stderr", "is not paged: `farmem run` did not answer its pager");
    fs::write(rig.path("stop"), "").unwrap();
    assert!(late.0.wait().unwrap().success() && !ended);
}

/// R6: as of a killed watcher.
#[test]
fn a_pager_killed_before_it_has_begun_is_told() {
    let Some(rig) = Rig::new() else { return };
    let mut late = late_supervisor(&rig);
    let supervisor = pid_of(&late.0);
    kill(child_named(supervisor, "farmem-pagerd"), Signal::KILL);
    wait_for_text(&rig, "stdout", "filled");
    kill(supervisor, Signal::CONT);
    wait_for_text(&rig, "stderr", "a pager that had not begun");
    fs::write(rig.path("stop"), "").unwrap();
    assert!(late.0.wait().unwrap().success());
}

/// R6: nothing of a run outlives its supervisor.
#[test]
fn a_killed_supervisor_takes_all_with_it() {
    let Some(rig) = Rig::new() else { return };
    let mut cast = Cast::new(&rig, &[], "busy");
    let server = cast.private_server();
    kill(cast.supervisor, Signal::KILL);
    for (name, pid) in
        [("the program", cast.program), ("its pager", cast.pager), ("the private server", server)]
    {
        assert!(ends_within(pid, SECOND), "{name} lives");
    }
    assert!(!cast.running.end(SECOND).stderr.contains("wrong"));
}

/// R6: what a killed program had on a server is free again within a second.
#[test]
fn a_killed_program_leaves_nothing_on_the_server() {
    let Some(rig) = Rig::new() else { return };
    let server = Server::start(&rig, "1GiB");
    let mut cast = Cast::new(&rig, &["--server", &server.address], "busy");
    let before = server.show();
    assert_eq!(before["sessions"], 1);
    assert!(before["used_bytes"].as_u64() > Some(64 << 20), "{before}");
    kill(cast.program, Signal::KILL);
    // farmem dies of the same signal, and only after it has ended the session.
    let outcome = cast.running.end(SECOND);
    assert!(outcome.status.code().is_none(), "{outcome:?}");
    outcome.has_paged();
    let after = server.show();
    for name in ["sessions", "used_bytes", "reserved_bytes", "orphaned_sessions"] {
        assert_eq!(after[name], 0, "{name} in {after}");
    }
}

/// R6: whoever ends a run ends also what the program left running.
#[test]
fn a_terminated_run_leaves_nobody_behind() {
    let Some(rig) = Rig::new() else { return };
    let program = rig.compile("endless");
    let mut running = rig.start(&["--local", LIMIT], &program, &["child"]);
    running.says("filled");
    let supervisor = pid_of(&running.child);
    let orphan = child_named(supervisor, "endless");
    kill(supervisor, Signal::TERM);
    assert!(ends_within(orphan, SECOND), "the orphan lives");
    running.end(SECOND).is_right();
}

/// R1, R6 (u30): a program that was stopped for a while goes on as if nothing had been.
#[test]
fn u30_a_stopped_program_goes_on() {
    let Some(rig) = Rig::new() else { return };
    let mut cast = Cast::new(&rig, &[], "busy");
    kill(cast.program, Signal::STOP);
    assert!(!ends_within(cast.pager, SECOND));
    kill(cast.program, Signal::CONT);
    assert!(!ends_within(cast.program, SECOND));
    kill(cast.supervisor, Signal::INT);
    let outcome = cast.running.end(5 * SECOND);
    assert!(!outcome.stderr.contains("wrong"), "{outcome:?}");
    outcome.has_paged();
}

/// A run is told to end when its program has ended just before: it leaves nothing behind.
#[test]
fn a_run_told_to_end_at_its_end_leaves_no_folder() {
    let Some(rig) = Rig::new() else { return };
    let folder = rig.path("temporary");
    fs::create_dir(&folder).unwrap();
    let worker = rig.compile("worker");
    let mut command = rig.farmem();
    command.env("TMPDIR", &folder).args(["run", "--quiet", "--local", LIMIT, "--"]);
    command.arg(&worker).args(["128", "idle"]).stdout(std::process::Stdio::null());
    fs::write(rig.path("stop"), "").unwrap();
    let mut child = command.spawn().unwrap();
    let supervisor = pid_of(&child);
    let is_there = || {
        let pids = children_named(supervisor, "worker");
        pids.iter().any(|&pid| !ends_within(pid, Duration::ZERO))
    };
    let until = Instant::now() + 60 * SECOND;
    while !is_there() && Instant::now() < until {
        thread::sleep(Duration::from_millis(1));
    }
    while is_there() && Instant::now() < until {
        thread::sleep(Duration::from_millis(1));
    }
    // When it has cleaned up it may die of it.
    while child.try_wait().unwrap().is_none() {
        kill(supervisor, Signal::TERM);
        thread::sleep(Duration::from_millis(1));
    }
    let left: Vec<_> = fs::read_dir(&folder).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}
