//! Another process goes on where one was killed.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use farmem_memserver::{FileTierConfig, MemServer, ServerConfig, ServerError};
use farmem_region::{ByteCount, Incarnation, PAGE_SIZE, PageCount};
use farmem_transport::Endpoint;
use farmem_wire::{Action, AttachMode, PAGE_SIZES, RefusalCode, Source, Tier};

use crate::model::Model;
use crate::raw::{Raw, TestServer, patiently};
use crate::tiers::content;

const PLACE: &str = "FARMEM_TEST_SERVER_IN_A_PROCESS";

fn pages(count: u64) -> ByteCount {
    PageCount::new(count).bytes()
}

pub(crate) fn configured(socket: PathBuf, data: &Path) -> ServerConfig {
    let mut config = ServerConfig::new(vec![Endpoint::Unix(socket)], pages(256));
    config.data = Some(data.to_owned());
    config.tiers.compressed = pages(1024);
    let directory = data.parent().unwrap().to_owned();
    config.directories = vec![directory.canonicalize().unwrap()];
    config.tiers.file = Some(FileTierConfig { directory, size: pages(4096) });
    config.promise_percent = 1000;
    config.limits.inflight_bytes = pages(64);
    // So that it is rewritten all the time.
    config.limits.journal_bytes = ByteCount::new(64 << 10);
    config.workers = 2;
    config
}

/// The process of [`TestServer::spawn`]: this test, alone.
#[test]
fn serve_in_a_process() {
    let Some(place) = std::env::var_os(PLACE).map(PathBuf::from) else {
        return;
    };
    let (data, socket) = (place.join("data"), fs::read_link(place.join("socket")).unwrap());
    let mut config = configured(socket, &data);
    if let Ok(memory) = fs::read_to_string(place.join("memory")) {
        config.memory = pages(memory.parse().unwrap());
    }
    MemServer::bind(config).unwrap().run().unwrap();
}

pub(crate) fn in_a_process(place: PathBuf) -> impl Fn(&Path) -> Command {
    move |socket| {
        let _ = std::os::unix::fs::symlink(socket, place.join("socket"));
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["restart::serve_in_a_process", "--exact", "--quiet", "--nocapture"]);
        command.env(PLACE, &place).stdout(std::process::Stdio::null());
        command
    }
}

pub(crate) fn in_memory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// A server on this thread's machine that is started again and again with the same data.
pub(crate) fn started(place: &Path, change: impl FnOnce(&mut ServerConfig)) -> TestServer {
    TestServer::start(256, |config| {
        let log = config.log.clone();
        let Endpoint::Unix(socket) = config.listen[0].clone() else {
            unreachable!("it is a Unix socket");
        };
        *config = configured(socket, &place.join("data"));
        config.log = log;
        change(config);
    })
}

fn refusal(place: &Path, change: impl FnOnce(&mut ServerConfig)) -> String {
    let mut config = configured(place.join("other"), &place.join("data"));
    change(&mut config);
    match MemServer::bind(config) {
        Err(ServerError::Data(error)) => error.to_string(),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("it starts"),
    }
}

/// All operations at random, with pages on their way between tiers all the time, and the server
/// killed in the midst of writes again and again.
#[test]
fn cap_95_every_operation_agrees_with_a_plain_vector_though_the_server_is_killed() {
    for (seed, page_bytes) in (0..).zip(PAGE_SIZES) {
        let place = in_memory();
        let server = TestServer::spawn(in_a_process(place.path().to_owned()));
        // A portion of 2 MiB that is made from a file would be more than its memory.
        let files = (page_bytes < 2 << 20).then(|| place.path());
        let mut model = Model::new(&server, 77 + seed, page_bytes, files);
        model.backups = Some(place.path().canonicalize().unwrap());
        model.run(2000);
    }
}

/// Cap 74: whenever the server is killed, the backup that is there is the old or the new one.
#[test]
fn cap_74_a_backup_in_which_the_server_is_killed_is_the_old_or_the_new_one() {
    let place = in_memory();
    let server = TestServer::spawn(in_a_process(place.path().to_owned()));
    let backup = place.path().canonicalize().unwrap().join("backup");
    let backup = backup.to_str().unwrap();
    Raw::greeted(&server).create("region", 500 * 4096, 4096, Source::Fill(0)).unwrap();
    let write = |version: u64| {
        let mut client = Raw::opened(&server, "region").unwrap();
        for page in (0..500).step_by(1 + version as usize % 3) {
            client.write_pages(&[(page, version, content(page, version, false))]).unwrap();
        }
        let pages = (0..500).map(|page| client.read_page(page).unwrap());
        pages.collect::<Vec<_>>()
    };
    let mut old = write(1);
    Raw::opened(&server, "region").unwrap().back_up(backup, false).unwrap();
    let (mut was_old, mut was_new) = (0, 0);
    for round in 2..14 {
        let new = write(round);
        let mut client = Raw::opened(&server, "region").unwrap();
        client.send_backup(backup, round % 2 == 0);
        std::thread::sleep(std::time::Duration::from_micros(round * round * 60));
        server.restart();
        Raw::restore(&server, backup, "again", true).unwrap();
        let mut again = Raw::opened(&server, "again").unwrap();
        let found: Vec<_> = (0..500).map(|page| again.read_page(page).unwrap()).collect();
        assert!(found == old || found == new, "round {round}");
        if found == new {
            was_new += 1;
            old = new;
        } else {
            was_old += 1;
        }
        let sessions = server.stat().sessions;
        assert_eq!(sessions, 0, "the snapshot of a killed backup is gone");
    }
    eprintln!("{was_old} times the old one, {was_new} times the new one");
}

#[test]
fn cap_95_a_session_goes_on_after_a_kill() {
    let place = in_memory();
    let server = TestServer::spawn(in_a_process(place.path().to_owned()));
    let mut client = Raw::with_region(&server, 900);
    for page in 0..900 {
        client.write_pages(&[(page, 1, content(page, 1, page % 2 == 0))]).unwrap();
    }
    client.free(100, 50).unwrap();
    server.restart();
    // The numbers of connections begin anew: no later one is taken for this one.
    let mut client = client.attach(&server, AttachMode::Join, client.connection).unwrap();
    assert_eq!(server.stat().orphaned_sessions, 0);
    for page in 0..900 {
        match client.read_page(page) {
            Ok(found) => {
                assert!(!(100..150).contains(&page));
                assert!(found == (1, content(page, 1, page % 2 == 0).to_vec()), "page {page}");
            }
            Err(code) => {
                assert_eq!((code, (100..150).contains(&page)), (RefusalCode::NoPage, true));
            }
        }
    }
    client.malloc(900, 100).unwrap_err();
    let (header, _) = client.call(client.request(Action::Disconnect), |_| ());
    assert_eq!(header.refusal, None);
    server.wait_until_empty_but(1);
}

#[test]
fn cap_95_named_regions_copies_files_and_pins_outlive_the_server() {
    let place = in_memory();
    fs::write(place.path().join("table"), [7; 64 * PAGE_SIZE]).unwrap();
    let table = place.path().join("table");
    let source = Source::File { path: table.to_str().unwrap(), offset: 0 };
    let server = started(place.path(), |config| config.promise_percent = 100_000);
    let mut admin = Raw::greeted(&server);
    admin.create("file", 64 * PAGE_SIZE as u64, 4096, source).unwrap();
    admin.create("zeros", 1 << 30, 4096, Source::Fill(0)).unwrap();
    let mut file = Raw::opened(&server, "file").unwrap();
    file.write(&[(3, 1, 33), (4, 1, 44)]).unwrap();
    file.copy(Action::Clone, "copy", false).unwrap();
    file.write(&[(4, 2, 45)]).unwrap();
    file.over(Action::Flush, 0, 4).unwrap();
    file.over(Action::Pin, 8, 8).unwrap();
    let mut zeros = Raw::opened(&server, "zeros").unwrap();
    zeros.write(&[(200_000, 5, 9)]).unwrap();
    zeros.copy(Action::Snapshot, "frozen", false).unwrap();
    // Sizes, who is whose copy, and where it is to be kept.
    zeros.resize(201_000).unwrap();
    zeros.resize(250_000).unwrap();
    zeros.prefer(Some(Tier::Dram), 100, 1000).unwrap();
    zeros.prefer(None, 200, 100).unwrap();
    let incarnation = zeros.session.incarnation;
    let before = (file.show(), server.stat());
    drop(server);
    let server = started(place.path(), |_| ());
    let mut file = Raw::opened(&server, "file").unwrap();
    assert_eq!(file.session.incarnation, incarnation);
    let (now, stat) = (file.show(), server.stat());
    assert_eq!(
        (now.dirty, now.pinned, now.stored),
        (before.0.dirty, before.0.pinned, before.0.stored)
    );
    assert_eq!((stat.regions, stat.reserved_bytes), (4, before.1.reserved_bytes));
    let mut zeros = Raw::opened(&server, "zeros").unwrap();
    let info = zeros.show();
    assert_eq!((info.pages.get(), info.preferred[0].get()), (250_000, 900));
    assert_eq!(zeros.read(&[(200_000, 5), (249_999, 0)]), Ok(vec![9, 0]));
    assert_eq!(zeros.delete_uncopied(), Err(RefusalCode::Copied));
    assert_eq!(file.read(&[(3, 1), (4, 2), (5, 0)]), Ok(vec![33, 45, 7]));
    assert_eq!(file.over(Action::Flush, 0, 64), Ok(1), "only what was not written back");
    // What the former process had told may be believed still: for a moment nothing may be changed.
    assert_eq!(patiently(|| file.free(8, 8)), Err(RefusalCode::Pinned));
    let mut copy = Raw::opened(&server, "copy").unwrap();
    assert_eq!(copy.read(&[(3, 1), (4, 1), (5, 0)]), Ok(vec![33, 44, 7]));
    let mut frozen = Raw::opened(&server, "frozen").unwrap();
    assert_eq!(frozen.read(&[(200_000, 5), (1, 0)]), Ok(vec![9, 0]));
    assert_eq!(frozen.write(&[(1, 1, 1)]), Err(RefusalCode::Frozen));
    drop(server);
    // The file is gone: what is in memory of it still is there, what is not is refused.
    fs::remove_file(&table).unwrap();
    let server = started(place.path(), |_| ());
    let mut file = Raw::opened(&server, "file").unwrap();
    assert_eq!(file.read(&[(3, 1)]), Ok(vec![33]));
    assert_eq!(file.read(&[(60, 0)]), Err(RefusalCode::FileFailed));
    assert!(server.logs("cannot open"));
}

/// A file that has another one's name is not that one: of a region nothing comes from it, and nothing goes there.
#[test]
fn cap_95_a_backing_file_that_was_replaced_is_not_mixed_with_the_former_one() {
    let place = in_memory();
    let [table, former] = ["table", "former"].map(|name| place.path().join(name));
    fs::write(&table, [7; 64 * PAGE_SIZE]).unwrap();
    let source = Source::File { path: table.to_str().unwrap(), offset: 0 };
    let server = started(place.path(), |_| ());
    Raw::greeted(&server).create("file", 64 * PAGE_SIZE as u64, 4096, source).unwrap();
    let mut file = Raw::opened(&server, "file").unwrap();
    file.write(&[(3, 1, 33)]).unwrap();
    assert_eq!(file.read(&[(5, 0)]), Ok(vec![7]));
    fs::rename(&table, &former).unwrap();
    fs::write(&table, [9; 64 * PAGE_SIZE]).unwrap();
    assert_eq!(file.read(&[(6, 0)]), Ok(vec![7]), "the server has the former one open");
    let check = |server: &TestServer| {
        assert!(server.logs_all(&["table is another file than", "put the former file back"]));
        let mut file = Raw::opened(server, "file").unwrap();
        assert_eq!(file.read(&[(3, 1), (5, 0), (6, 0)]), Ok(vec![33, 7, 7]));
        assert_eq!(file.read(&[(60, 0)]), Err(RefusalCode::FileFailed));
        assert_eq!(file.over(Action::Flush, 0, 64), Err(RefusalCode::FileFailed));
    };
    server.hand_over();
    check(&server);
    drop(server);
    // Nor is it forgotten by the next one.
    for _ in 0..2 {
        check(&started(place.path(), |_| ()));
    }
    assert_eq!(fs::read(&table).unwrap(), [9; 64 * PAGE_SIZE]);
    fs::rename(&former, &table).unwrap();
    let server = started(place.path(), |_| ());
    let mut file = Raw::opened(&server, "file").unwrap();
    assert_eq!(file.read(&[(60, 0), (3, 1)]), Ok(vec![7, 33]));
    assert_eq!(file.over(Action::Flush, 0, 64), Ok(1));
}

/// What is lost is said to be lost: never zeros in place of data.
#[test]
fn cap_95_lost_contents_are_another_incarnation() {
    type Harm = fn(&Path);
    let harms: [(&str, Harm); 5] = [
        ("is gone", |data| fs::remove_file(data.join("arena")).unwrap()),
        ("another one", |data| {
            let length = fs::metadata(data.join("arena")).unwrap().len();
            fs::rename(data.join("arena"), data.join("moved")).unwrap();
            fs::write(data.join("arena"), vec![0; length as usize]).unwrap();
        }),
        ("or shorter", |data| {
            let arena = fs::OpenOptions::new().write(true).open(data.join("arena")).unwrap();
            arena.set_len(1 << 20).unwrap();
        }),
        ("damaged at byte", |data| {
            let journal = fs::OpenOptions::new().write(true).open(data.join("journal")).unwrap();
            journal.write_all_at(&[0xff], 400).unwrap();
        }),
        ("journal is damaged", |data| {
            let journal = fs::OpenOptions::new().write(true).open(data.join("journal")).unwrap();
            journal.write_all_at(&[0xff], 20).unwrap();
        }),
    ];
    for (expected, harm) in harms {
        let place = in_memory();
        let server = started(place.path(), |_| ());
        let mut client = Raw::with_region(&server, 100);
        (0..100).for_each(|page| client.write(&[(page, 1, 1)]).unwrap());
        drop(server);
        harm(&place.path().join("data"));
        let server = started(place.path(), |_| ());
        assert!(server.logs(expected), "{expected}");
        let now = Raw::greeted(&server).session.incarnation;
        assert!(now != client.session.incarnation && now != Incarnation::new(0));
        let attached = client.attach(&server, AttachMode::Join, 0).map(|_| ());
        assert_eq!(attached, Err(RefusalCode::WrongIncarnation));
        assert_eq!(server.stat().slots, 0);
    }
}

/// Directories for data whose paths differ by a hyphen and a slash have a file each, which nobody else may have.
#[test]
fn cap_95_no_two_directories_share_a_file_of_the_file_tier() {
    let place = in_memory();
    let parts = ["a-b", "a/b"].map(|name| place.path().join(name));
    let start = |data: &Path| {
        let data = data.to_owned();
        started(place.path(), move |config| config.data = Some(data))
    };
    fs::create_dir(place.path().join("a")).unwrap();
    let mut clients = Vec::new();
    for (number, data) in (1..).zip(&parts) {
        let server = start(data);
        let mut client = Raw::with_region(&server, 2000);
        for page in 0..2000 {
            client.write_pages(&[(page, number, content(page, number, false))]).unwrap();
        }
        clients.push((number, client));
    }
    let check = |number: u64, client: &Raw, server: &TestServer| {
        let mut client = client.attach(server, AttachMode::Join, 0).unwrap();
        for page in 0..2000 {
            let found = client.read_page(page).unwrap();
            assert!(found == (number, content(page, number, false).to_vec()), "page {page}");
        }
    };
    for (data, (number, client)) in parts.iter().zip(&clients) {
        check(*number, client, &start(data));
    }
    // A file that a former build has named is found, and named anew.
    let path = parts[0].canonicalize().unwrap().to_str().unwrap().to_owned();
    let name = |path: String| place.path().join(format!("farmem-tier{}", path.replace('/', "-")));
    let now = name(path.replace('-', "%2d"));
    // The other one's name is the former one of this.
    let other = place.path().join("kept");
    fs::rename(name(path.clone()), &other).unwrap();
    fs::rename(&now, name(path.clone())).unwrap();
    check(1, &clients[0].1, &start(&parts[0]));
    assert!(now.exists() && !name(path.clone()).exists());
    fs::rename(&other, name(path)).unwrap();
    check(2, &clients[1].1, &start(&parts[1]));
    // Whoever has it open is not disturbed.
    let file = fs::File::open(&now).unwrap();
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let refused = refusal(place.path(), |config| config.data = Some(parts[0].clone()));
    assert!(refused.contains("another server uses") && refused.contains("%2d"), "{refused}");
    drop(file);
    check(1, &clients[0].1, &start(&parts[0]));
}

/// Whoever has nothing in a file takes none that has its former name: that is another directory's own one.
#[test]
fn cap_95_a_file_of_the_file_tier_is_not_taken_by_who_has_nothing_in_it() {
    let place = in_memory();
    fs::create_dir(place.path().join("a")).unwrap();
    let [one, other] = ["a/b", "a-b"].map(|name| place.path().join(name));
    let start = |data: &Path, has_file: bool| {
        let data = data.to_owned();
        started(place.path(), move |config| {
            config.data = Some(data);
            config.tiers.file = config.tiers.file.take().filter(|_| has_file);
        })
    };
    let mut empty = Raw::with_region(&start(&other, false), 10);
    let server = start(&one, true);
    let mut client = Raw::with_region(&server, 2000);
    for page in 0..2000 {
        client.write_pages(&[(page, 1, content(page, 1, false))]).unwrap();
    }
    drop(server);
    let second = start(&other, true);
    empty = empty.attach(&second, AttachMode::Join, 0).unwrap();
    empty.write(&[(3, 1, 3)]).unwrap();
    let server = start(&one, true);
    let mut client = client.attach(&server, AttachMode::Join, 0).unwrap();
    for page in 0..2000 {
        let found = client.read_page(page).unwrap();
        assert!(found == (1, content(page, 1, false).to_vec()), "page {page}");
    }
    let files = fs::read_dir(place.path()).unwrap().flatten();
    let is_tier = |name: &str| name.starts_with("farmem-tier");
    let tiers = files.filter(|file| is_tier(file.file_name().to_str().unwrap())).count();
    assert_eq!(tiers, 2);
}

/// The path of a directory for data may be longer than a name of a file.
#[test]
fn cap_95_a_directory_with_a_long_path_has_a_file_tier() {
    let place = in_memory();
    let parent = place.path().join("-".repeat(120));
    fs::create_dir(&parent).unwrap();
    let start = || {
        let data = parent.join("data");
        started(place.path(), move |config| config.data = Some(data))
    };
    let server = start();
    let mut client = Raw::with_region(&server, 2000);
    for page in 0..2000 {
        client.write_pages(&[(page, 1, content(page, 1, false))]).unwrap();
    }
    drop(server);
    let server = start();
    let mut client = client.attach(&server, AttachMode::Join, 0).unwrap();
    for page in 0..2000 {
        let found = client.read_page(page).unwrap();
        assert!(found == (1, content(page, 1, false).to_vec()), "page {page}");
    }
}

/// What is lost is set aside, once: whoever knows how to mend it has it back.
#[test]
fn cap_95_what_is_given_up_as_lost_is_set_aside_and_can_be_mended() {
    let place = in_memory();
    let data = place.path().join("data");
    let harm = |name: &str| {
        let journal = fs::OpenOptions::new().read(true).write(true).open(data.join(name)).unwrap();
        let mut byte = [0];
        journal.read_exact_at(&mut byte, 20).unwrap();
        journal.write_all_at(&[byte[0] ^ 0x10], 20).unwrap();
    };
    let fill = |client: &mut Raw| {
        for page in 0..2000 {
            client.write_pages(&[(page, 1, content(page, 1, false))]).unwrap();
        }
    };
    let server = started(place.path(), |_| ());
    let mut client = Raw::with_region(&server, 2000);
    fill(&mut client);
    drop(server);
    harm("journal");
    let server = started(place.path(), |_| ());
    assert!(server.logs("end with .lost"));
    // What the new server does touches nothing of it.
    fill(&mut Raw::with_region(&server, 2000));
    drop(server);
    let files: Vec<PathBuf> = [&data, place.path()]
        .into_iter()
        .flat_map(|directory| fs::read_dir(directory).unwrap())
        .map(|file| file.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "lost"))
        .collect();
    assert_eq!(files.len(), 3, "{files:?}");
    for file in files {
        fs::rename(&file, file.with_extension("")).unwrap();
    }
    harm("journal");
    let server = started(place.path(), |_| ());
    let mut client = client.attach(&server, AttachMode::Join, 0).unwrap();
    for page in 0..2000 {
        let found = client.read_page(page).unwrap();
        assert!(found == (1, content(page, 1, false).to_vec()), "page {page}");
    }
}

/// Without the file that pages lie in the server does not start, and what it has stays for one that has it.
#[test]
fn cap_95_a_start_without_the_former_file_tier_is_refused_and_loses_nothing() {
    let place = in_memory();
    let server = started(place.path(), |_| ());
    let mut client = Raw::with_region(&server, 2000);
    for page in 0..2000 {
        client.write_pages(&[(page, 1, content(page, 1, false))]).unwrap();
    }
    assert!(server.stat().file_bytes > 1000 * PAGE_SIZE as u64);
    drop(server);
    let none = refusal(place.path(), |config| config.tiers.file = None);
    assert!(none.contains("--tier file=DIR:SIZE"), "{none}");
    let tier = |config: &mut ServerConfig| config.tiers.file.clone().unwrap();
    let small = refusal(place.path(), |config| {
        config.tiers.file = Some(FileTierConfig { size: pages(100), ..tier(config) });
    });
    assert!(small.contains("at least that SIZE"), "{small}");
    // As if its disk was not mounted.
    let empty = place.path().join("empty");
    fs::create_dir(&empty).unwrap();
    let unmounted = refusal(place.path(), |config| {
        config.tiers.file = Some(FileTierConfig { directory: empty.clone(), ..tier(config) });
    });
    assert!(unmounted.contains("is mounted"), "{unmounted}");
    assert_eq!(fs::read_dir(&empty).unwrap().count(), 0);
    let mut files = fs::read_dir(place.path()).unwrap().map(|file| file.unwrap().path());
    let file = files.find(|path| path.to_str().unwrap().contains("farmem-tier")).unwrap();
    fs::rename(&file, empty.join("kept")).unwrap();
    fs::write(&file, [0; 100]).unwrap();
    let cut = refusal(place.path(), |_| ());
    assert!(cut.contains("is shorter"), "{cut}");
    fs::rename(empty.join("kept"), &file).unwrap();
    let server = started(place.path(), |_| ());
    let mut client = client.attach(&server, AttachMode::Join, 0).unwrap();
    for page in 0..2000 {
        let found = client.read_page(page).unwrap();
        assert!(found == (1, content(page, 1, false).to_vec()), "page {page}");
    }
    // Once nothing lies in the file it is not asked for, though the journal still speaks of it.
    client.call(client.request(Action::Disconnect), |_| ());
    drop(server);
    started(place.path(), |config| config.tiers.file = None);
}

/// What another boot of the machine has left is believed only if the disk had all of it.
#[test]
fn cap_95_only_what_was_stopped_in_order_outlives_the_machine() {
    let place = in_memory();
    let reboot = || {
        let path = place.path().join("data/journal");
        let mut journal = fs::read(&path).unwrap();
        journal[24] ^= 1;
        let crc = farmem_wire::crc32c(&journal[..60]).to_le_bytes();
        journal[60..64].copy_from_slice(&crc);
        let file = fs::OpenOptions::new().write(true).open(path).unwrap();
        file.write_all_at(&journal[..64], 0).unwrap();
    };
    let server = started(place.path(), |_| ());
    let mut client = Raw::with_region(&server, 10);
    client.write(&[(1, 1, 1)]).unwrap();
    drop(server);
    reboot();
    let server = started(place.path(), |_| ());
    let mut client = client.attach(&server, AttachMode::Join, 0).unwrap();
    assert_eq!(client.read(&[(1, 1)]), Ok(vec![1]));
    client.write(&[(1, 2, 2)]).unwrap();
    drop(server);
    let server = TestServer::spawn(in_a_process(place.path().to_owned()));
    let mut client = client.attach(&server, AttachMode::Join, 0).unwrap();
    assert_eq!(client.read(&[(1, 2)]), Ok(vec![2]));
    drop(server);
    reboot();
    let server = started(place.path(), |_| ());
    assert!(server.logs("the machine has ended since"));
    let attached = client.attach(&server, AttachMode::Join, 0).map(|_| ());
    assert_eq!(attached, Err(RefusalCode::WrongIncarnation));
}

#[test]
fn what_a_server_cannot_go_on_with_is_refused_and_stays() {
    let place = in_memory();
    let data = place.path().join("data");
    let server = started(place.path(), |config| config.memory = pages(2000));
    let mut client = Raw::with_region(&server, 10);
    client.write(&[(1, 1, 1)]).unwrap();
    assert!(refusal(place.path(), |_| ()).contains("another server uses"));
    drop(server);
    assert!(
        refusal(place.path(), |config| config.memory = pages(100)).contains("--memory 8192000")
    );
    fs::set_permissions(&data, fs::Permissions::from_mode(0o755)).unwrap();
    assert!(refusal(place.path(), |_| ()).contains("0700"));
    fs::set_permissions(&data, fs::Permissions::from_mode(0o700)).unwrap();
    let journal = fs::OpenOptions::new().write(true).open(data.join("journal")).unwrap();
    journal.write_all_at(&[9], 8).unwrap();
    assert!(refusal(place.path(), |_| ()).contains("has version 9"));
    // An older version is gone on with.
    let mut header = fs::read(data.join("journal")).unwrap()[..64].to_vec();
    header[8] = 1;
    let crc = farmem_wire::crc32c(&header[..60]).to_le_bytes();
    header[60..].copy_from_slice(&crc);
    journal.write_all_at(&header, 0).unwrap();
    // More memory is fine.
    let server = started(place.path(), |config| config.memory = pages(4000));
    let mut client = client.attach(&server, AttachMode::Join, 0).unwrap();
    assert_eq!(client.read(&[(1, 1)]), Ok(vec![1]));
}
