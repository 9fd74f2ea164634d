//! Programs and memory that are not paged: they run as without farmem, and it is told.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Output};

use crate::rig::{LIMIT, Rig};

/// The whole of what farmem says about a run.
fn told(rig: &Rig, program: &Path, arguments: &[&str]) -> Output {
    let mut command = rig.farmem();
    command.args(["run", "--local", LIMIT, "--"]).arg(program).args(arguments).output().unwrap()
}

#[track_caller]
fn lines(output: &Output) -> Vec<String> {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stderr).lines().map(str::to_owned).collect()
}

/// One line before the start, one summary.
#[test]
fn a_static_program_runs_unpaged_and_is_told() {
    let Some(rig) = Rig::new() else { return };
    let program = rig.path("grow-static");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/traps/programs/grow.c");
    let cc = Command::new("cc").args(["-O1", "-static", "-o"]).arg(&program).arg(source).status();
    assert!(cc.unwrap().success());
    let lines = lines(&told(&rig, &program, &["64"]));
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert!(lines[0].contains("runs without paging: it is a static executable"), "{lines:?}");
    assert!(lines[1].ends_with("nothing went out"), "{lines:?}");
}

/// The loader ignores preload libraries of programs that gain rights.
#[test]
fn a_program_that_gains_rights_runs_unpaged_and_is_told() {
    let Some(rig) = Rig::new() else { return };
    let program = rig.compile("grow");
    let owner = 65534;
    assert_ne!(fs::metadata(&program).unwrap().uid(), owner);
    if std::os::unix::fs::chown(&program, Some(owner), Some(owner)).is_err() {
        crate::rig::skipped::<()>("only root can give a file away");
        return;
    }
    // After the file changed hands: that takes the bit away.
    fs::set_permissions(&program, fs::Permissions::from_mode(0o4755)).unwrap();
    let lines = lines(&told(&rig, &program, &["64"]));
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert!(lines[0].contains("runs without paging: it gains rights"), "{lines:?}");
    assert!(lines[1].ends_with("nothing went out"), "{lines:?}");
}

/// R1, R6: memory that the program pages itself stays, also if that is more than the limit, and the
/// rest is paged.
#[test]
fn u28_memory_that_the_program_pages_itself_stays_and_is_told() {
    let Some(rig) = Rig::new() else { return };
    let lines = lines(&told(&rig, &rig.compile("own_userfaultfd"), &[]));
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].contains("of a userfaultfd of its own 40 MiB"), "{lines:?}");
}

/// R1: shared memory is one for parent and child, and its size is told.
#[test]
fn u25_shared_memory_stays_and_is_told() {
    let Some(rig) = Rig::new() else { return };
    let lines = lines(&told(&rig, &rig.compile("shared"), &[]));
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].contains("shared 24 MiB"), "{lines:?}");
}

/// A user whom the kernel grants no userfaultfd with all events is refused before the program starts,
/// with what is missing; without the events reads would return zeros.
#[test]
fn u17_u33_a_user_without_the_permissions_is_refused() {
    use std::os::unix::process::CommandExt;
    let Some(rig) = Rig::new() else { return };
    if !rustix::process::geteuid().is_root() {
        crate::rig::skipped::<()>("only root can become another user");
        return;
    }
    // Where everybody may go.
    let folder = tempfile::tempdir_in("/tmp").unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let built = rig.farmem().get_program().to_owned();
    for name in ["farmem", "libfarmem_preload.so", "farmem-pagerd"] {
        let from = Path::new(&built).with_file_name(name);
        fs::copy(from, folder.path().join(name)).unwrap();
    }
    let mut command = Command::new(folder.path().join("farmem"));
    command.args(["run", "--local", LIMIT, "--", "echo", "ran"]).current_dir("/");
    let output = command.uid(65534).gid(65534).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && output.stdout.is_empty(), "{output:?}");
    for part in ["userfaultfd", "farmem doctor"] {
        assert!(stderr.contains(part), "no {part} in {output:?}");
    }
}
