//! Process trees: one limit for all, divided by need.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::rig::{LIMIT, Outcome, Rig, Running, ends_within};

const MIB: u64 = 1 << 20;
/// What has to come about takes a second or two on two idle processors.
const PATIENCE: Duration = Duration::from_secs(60);

/// Processes of one tree, and what each does.
struct Workers<'a> {
    rig: &'a Rig,
    running: Running<'a>,
    pids: Vec<u32>,
}

impl<'a> Workers<'a> {
    /// Starts a shell that starts one worker for each of `ways`, with so much memory each, and waits
    /// until all have filled it.
    fn start(rig: &'a Rig, limit: &str, mebibytes: u64, ways: &[&str]) -> Self {
        Self::start_below(rig, limit, mebibytes, ways, &[])
    }

    /// The same below a program that runs its arguments.
    fn start_below(
        rig: &'a Rig,
        limit: &str,
        mebibytes: u64,
        ways: &[&str],
        above: &[&str],
    ) -> Self {
        let worker = rig.compile("worker");
        let mut script = String::new();
        for way in ways {
            script += &format!("{} {mebibytes} {way} & pids=\"$pids $!\"\n", worker.display());
        }
        script += "for pid in $pids; do wait $pid || exit 3; done\n";
        let command = [above, &["sh", "-c", &script]].concat();
        let mut running = rig.start(&["--local", limit], Path::new(command[0]), &command[1..]);
        let until = Instant::now() + PATIENCE;
        let mut pids = Vec::new();
        while pids.len() < ways.len() {
            assert!(running.child.try_wait().unwrap().is_none(), "ended early");
            assert!(Instant::now() < until, "{} of {} are filled", pids.len(), ways.len());
            std::thread::sleep(Duration::from_millis(5));
            let said = fs::read_to_string(rig.path("stdout")).unwrap();
            pids.clear();
            for way in ways.iter().collect::<std::collections::BTreeSet<_>>() {
                let lines = said.lines().filter(|line| line.ends_with(way));
                pids.extend(
                    lines.map(|line| line.split(' ').nth(1).unwrap().parse::<u32>().unwrap()),
                );
            }
        }
        // In the order of their ways' names: the busy ones first.
        Self { rig, running, pids }
    }

    /// What each has here.
    fn sizes(&self) -> Vec<u64> {
        self.pids.iter().map(|&pid| anonymous_bytes(pid)).collect()
    }

    /// Waits until the sizes are as they should be.
    #[track_caller]
    fn come_to(&self, what: &str, holds: impl Fn(&[u64]) -> bool) {
        let until = Instant::now() + PATIENCE;
        while !holds(&self.sizes()) {
            let sizes: Vec<u64> = self.sizes().iter().map(|size| size / MIB).collect();
            assert!(Instant::now() < until, "never {what}: {sizes:?} MiB");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn stop(mut self) -> Outcome {
        fs::write(self.rig.path("stop"), "").unwrap();
        self.running.end(PATIENCE)
    }
}

fn anonymous_bytes(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let number = line.and_then(|line| line.split_ascii_whitespace().next()?.parse::<u64>().ok());
    number.unwrap_or(0) * 1024
}

/// Cap 33: the sleeper keeps little but its floor, and the others get the rest.
#[test]
fn cap_33_an_idle_worker_leaves_its_share_to_the_busy_ones() {
    let Some(rig) = Rig::new() else { return };
    let workers = Workers::start(&rig, "128MiB", 96, &["busy", "busy", "idle"]);
    workers.come_to("divided by need", |sizes| {
        sizes[2] < 28 * MIB && sizes[0] > 40 * MIB && sizes[1] > 40 * MIB
    });
    workers.come_to("within the limit", |sizes| sizes.iter().sum::<u64>() <= 128 * MIB);
    workers.stop().is_right();
}

/// Cap 33: equal shares for equals.
#[test]
fn cap_33_busy_workers_have_about_the_same() {
    let Some(rig) = Rig::new() else { return };
    let workers = Workers::start(&rig, "96MiB", 64, &["busy", "busy", "busy"]);
    workers.come_to("even", |sizes| {
        sizes.iter().all(|size| *size > 20 * MIB) && sizes.iter().sum::<u64>() <= 96 * MIB
    });
    workers.stop().is_right();
}

/// Cap 33: none of these comes near the limit by itself.
#[test]
fn cap_33_many_small_processes_are_held_to_the_limit_together() {
    let Some(rig) = Rig::new() else { return };
    let ways = ["idle"; 8];
    let workers = Workers::start(&rig, "64MiB", 24, &ways);
    workers.come_to("within the limit", |sizes| sizes.iter().sum::<u64>() <= 64 * MIB);
    workers.stop().is_right();
}

/// Cap 33: their watchers are the subreaper's children then.
#[test]
fn cap_33_processes_below_a_subreaper_are_held_to_the_limit_together() {
    let Some(rig) = Rig::new() else { return };
    let subreaper = rig.compile("subreaper");
    let above = [subreaper.to_str().unwrap(), "wait"];
    let workers = Workers::start_below(&rig, "64MiB", 24, &["idle"; 8], &above);
    workers.come_to("within the limit", |sizes| sizes.iter().sum::<u64>() <= 64 * MIB);
    workers.stop().is_right();
}

/// The parent of a pager is not always the supervisor.
#[test]
fn a_program_goes_on_when_the_subreaper_above_its_pager_ends() {
    let Some(rig) = Rig::new() else { return };
    let subreaper = rig.compile("subreaper");
    let above = [subreaper.to_str().unwrap(), "leave"];
    let workers = Workers::start_below(&rig, LIMIT, 96, &["busy"], &above);
    workers.come_to("within the limit", |sizes| sizes[0] <= 32 * MIB);
    let worker = rustix::process::Pid::from_raw(workers.pids[0].cast_signed()).unwrap();
    fs::write(rig.path("leave"), "").unwrap();
    assert!(!ends_within(worker, Duration::from_secs(1)), "it was killed");
    let outcome = workers.stop();
    outcome.is_right();
    assert_eq!(outcome.stderr, "");
}

/// What a program waits for are the children that it has made.
#[test]
fn a_program_that_orphans_go_to_sees_none_of_farmems() {
    let Some(rig) = Rig::new() else { return };
    let subreaper = rig.compile("subreaper");
    let mut commands = vec![format!("{} exec", subreaper.display())];
    if rustix::process::geteuid().is_root() {
        commands.push(format!("unshare --pid --fork {} count", subreaper.display()));
    }
    for command in commands {
        let mut farmem = rig.farmem();
        farmem.args(["run", "--local", LIMIT, "--"]).args(command.split(' '));
        let output = farmem.output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command}: {output:?}");
        assert_eq!(output.stdout, b"0 children\n", "{command}: {output:?}");
        assert!(told.contains("is not paged"), "{command}: {told}");
    }
}

/// Cap 33: a large process has the whole limit again when the others have ended.
#[test]
fn cap_33_who_is_left_gets_all() {
    let Some(rig) = Rig::new() else { return };
    let worker = rig.compile("worker");
    let worker = worker.display();
    let script = format!(
        "{worker} 128 busy & {worker} 40 idle & other=$!\n\
         while ! test -e go; do sleep 0.02; done; kill $other; wait $other; \n\
         wait %1 || exit 3\n"
    );
    let mut running = rig.start(&["--local", "64MiB"], Path::new("sh"), &["-c", &script]);
    let busy = running.says_with("busy");
    let pid: u32 = busy.split(' ').nth(1).unwrap().parse().unwrap();
    let _ = running.says_with("idle");
    let mut workers = Workers { rig: &rig, running, pids: vec![pid] };
    workers.come_to("less than all", |sizes| sizes[0] < 52 * MIB);
    fs::write(rig.path("go"), "").unwrap();
    workers.come_to("all of the limit", |sizes| sizes[0] > 56 * MIB);
    workers.pids.clear();
    workers.stop().is_right();
}

/// What a program leaves running is told though it is paged. A supervisor that waited for the time to
/// tell it, and never did, would turn without a pause and let nobody else run.
#[test]
fn cap_33_what_is_left_running_is_told_though_it_is_paged() {
    let Some(rig) = Rig::new() else { return };
    let script = format!("{} 96 idle &", rig.compile("worker").display());
    let mut command = rig.farmem();
    command.args(["run", "--local", "32MiB", "--", "sh", "-c", &script]);
    command.stdout(fs::File::create(rig.path("stdout")).unwrap());
    command.stderr(fs::File::create(rig.path("stderr")).unwrap());
    let mut child = command.spawn().unwrap();
    let until = Instant::now() + PATIENCE;
    let told = loop {
        let told = fs::read_to_string(rig.path("stderr")).unwrap();
        if told.contains("waiting for what it left running") || Instant::now() > until {
            break told;
        }
        assert!(child.try_wait().unwrap().is_none(), "ended early: {told}");
        std::thread::sleep(Duration::from_millis(20));
    };
    let said = fs::read_to_string(rig.path("stdout")).unwrap();
    fs::write(rig.path("stop"), "").unwrap();
    assert!(child.wait().unwrap().success());
    let number = said.split(' ').nth(1).unwrap_or("no worker");
    assert!(told.contains(&format!("(process {number})")), "{said}{told}");
    assert_eq!(told.matches("waiting for").count(), 1, "{told}");
}

/// Each pager takes some of the supervisor's descriptors. The usual soft limit of 1,024 is that of programs.
#[test]
fn cap_33_the_supervisor_may_have_more_descriptors_than_its_program() {
    let Some(rig) = Rig::new() else { return };
    let script = r"for try in $(seq 2000); do
            grep -q 'Max open files *\([0-9][0-9]*\)  *\1 ' /proc/$PPID/limits && break
        done; ulimit -Sn; exit $((try == 2000))";
    let mut command = std::process::Command::new("sh");
    command.args(["-c", "ulimit -Sn 100; exec \"$0\" run --quiet -- sh -c \"$1\""]);
    command.arg(rig.farmem().get_program()).arg(script).current_dir(rig.path("."));
    let output = command.output().unwrap();
    assert_eq!((output.status.success(), &output.stdout[..]), (true, &b"100\n"[..]), "{output:?}");
}

/// Where the supervisor cannot take in a pager it says so, once, and waits: its listener is reported as
/// ready all the time.
#[test]
fn cap_33_a_supervisor_without_descriptors_says_so_and_does_not_turn_without_a_pause() {
    use rustix::process::{Resource, Rlimit, prlimit};
    let Some(rig) = Rig::new() else { return };
    let worker = rig.compile("worker");
    // One cannot accept, the other has accepted and can open nothing more.
    for descriptors in [5, 6] {
        let script = "echo ready; until test -e go; do sleep 0.01; done; exec \"$0\" 48 idle";
        let arguments = ["-c", script, worker.to_str().unwrap()];
        let mut running = rig.start(&["--local", LIMIT], Path::new("sh"), &arguments);
        let _ = running.says("ready");
        let supervisor = rustix::process::Pid::from_child(&running.child);
        let most = Rlimit { current: Some(descriptors), maximum: Some(descriptors) };
        prlimit(Some(supervisor), Resource::Nofile, most).unwrap();
        fs::write(rig.path("go"), "").unwrap();
        let _ = running.says_with("idle");
        let until = Instant::now() + PATIENCE;
        let told = || fs::read_to_string(rig.path("stderr")).unwrap();
        while !told().contains("cannot take in a pager") {
            assert!(Instant::now() < until && told().len() < 1000, "{:.1000}", told());
            std::thread::sleep(Duration::from_millis(20));
        }
        fs::write(rig.path("stop"), "").unwrap();
        let outcome = running.end(PATIENCE);
        assert!(outcome.status.success(), "{outcome:?}");
        assert_eq!(outcome.stderr.lines().count(), 1, "{outcome:?}");
        fs::remove_file(rig.path("go")).unwrap();
        fs::remove_file(rig.path("stop")).unwrap();
    }
}
