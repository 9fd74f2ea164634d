//! The bytes of the protocol, written down: a test that fails here has broken every peer that is
//! not rebuilt.

use farmem_region::{
    ByteCount, Checksum, Epoch, ExternalAddress, Incarnation, PAGE_SIZE, PageCount, PageIndex,
    PageRange, RegionId, SessionId, Version,
};
use farmem_wire::{
    Absent, Action, AskMap, Attach, AttachMode, Copy, Create, Delete, FileRange, Free, FullBody,
    GrantedSetup, HEADER_BYTES, Header, Hello, HelloReply, List, Malloc, MallocReply, MapChange,
    MapReply, Open, PageEntry, PartEntry, Prefer, Progress, RangeEntry, RefusalCode, RegionInfo,
    Resize, ServerStat, Setup, Slots, Source, TakenBody, Tier, page_checksum, part_checksum, seal,
};

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn header() -> Header {
    Header {
        session: SessionId::new(0x1112_1314_1516_1718),
        region: RegionId::new(0x2122_2324_2526_2728),
        epoch: Epoch::new(0x3132_3334_3536_3738),
        incarnation: Incarnation::new(0x4142_4344_4546_4748),
        token: 0x5152_5354_5556_5758,
        entries: 1,
        payload: PAGE_SIZE as u32,
        ..Header::request(Action::Write, 0x0102_0304_0506_0708)
    }
}

#[test]
fn header_bytes() {
    let expected = concat!(
        "4d534d50",         // magic
        "0100",             // version
        "06",               // action: write
        "00",               // flags
        "0807060504030201", // request
        "1817161514131211", // session
        "2827262524232221", // region
        "3837363534333231", // epoch
        "4847464544434241", // incarnation
        "5857565554535251", // token
        "01000000",         // entries
        "00100000",         // payload bytes
        "0000",             // status
        "0000",             // reserved
        "00000000",         // server's time
        "00000000",         // CRC of entries and body
        "12c312d5",         // CRC of the header
    );
    assert_eq!(hex(&header().encode()), expected);
}

#[test]
fn reply_bytes() {
    let reply = Header { server_nanos: 9, ..header().refused(RefusalCode::NoPage) };
    let bytes = reply.encode();
    assert_eq!(hex(&bytes[..8]), "4d534d5001000601");
    let leased = Header { leased: true, ..header().granted() };
    assert_eq!(hex(&leased.encode()[..8]), "4d534d5001000603");
    assert_eq!(hex(&bytes[48..72]), "000000000000000000000000000000000e00000009000000");
}

#[test]
fn entry_bytes() {
    let mut out = Vec::new();
    let (page, version) = (PageIndex::new(0x0102), Version::new(0x0304));
    PageEntry { page, version, checksum: Checksum::new(0x0506), slot: 0x0708 }.encode(&mut out);
    RangeEntry(PageRange { start: page, count: PageCount::new(0x090a) }).encode(&mut out);
    let checksum = Checksum::new(0x0506);
    PartEntry { page, version, checksum, first: 0x0a00, bytes: 0x0400 }.encode(&mut out);
    let expected = concat!(
        "0201000000000000",
        "0403000000000000",
        "0605000000000000",
        "08070000",
        "00000000",
        "0201000000000000",
        "0a09000000000000",
        "0000000000000000",
        "0000000000000000",
        "0201000000000000",
        "0403000000000000",
        "0605000000000000",
        "000a",
        "0004",
        "00000000",
    );
    assert_eq!(hex(&out), expected);
}

/// As many parts, and bytes of them, as there may be: the header is taken; with one more it is not.
#[test]
fn lengths_of_parts() {
    let of = |action, reply, entries, payload| {
        let header = Header { reply, entries, payload, ..Header::request(action, 1) };
        Header::decode(&header.encode()).map(|header| header.covered_bytes())
    };
    for (action, reply) in [(Action::WriteParts, false), (Action::ReadParts, true)] {
        assert_eq!(of(action, reply, 8, 4096), Ok(8 * 32 + 4096));
        assert!(of(action, reply, 9, 4096).is_err() && of(action, reply, 8, 4097).is_err());
    }
    // What carries no parts is as any other.
    assert_eq!(of(Action::ReadParts, false, 8, 0), Ok(8 * 32));
    assert!(of(Action::WriteParts, true, 0, 1025).is_err());
}

#[test]
fn part_checksum_value() {
    let content: [u8; 512] = std::array::from_fn(|at| at as u8);
    let (region, page, version) = (RegionId::new(1), PageIndex::new(2), Version::new(3));
    let of = |first, content: &[u8]| part_checksum(region, page, version, first, content).get();
    assert_eq!(of(512, &content), 0x6236_ac22_634e_6c35);
    assert_ne!(of(1024, &content), of(512, &content));
    assert_ne!(of(512, &content[..511]), of(512, &content));
}

#[test]
fn page_checksum_value() {
    let content: [u8; PAGE_SIZE] = std::array::from_fn(|at| at as u8);
    let of = page_checksum(RegionId::new(1), PageIndex::new(2), Version::new(3), &content);
    assert_eq!(of.get(), 0x2f65_63ba_44c1_b3fd);
}

#[test]
fn body_bytes() {
    let check = |write: &dyn Fn(&mut Vec<u8>), expected: &str| {
        let mut out = Vec::new();
        write(&mut out);
        assert_eq!(hex(&out), expected);
    };
    check(
        &|out| {
            Hello { oldest: 1, newest: 2, share_arena: true }.encode(out);
        },
        "0100020001000000",
    );
    let reply = HelloReply {
        version: 1,
        arena_shared: true,
        lasts: false,
        clones_have_ranges: true,
        session_timeout_ms: 10_000,
        connection: 7,
        actions: 0x1ffe,
        arena_slots: 9,
    };
    check(
        &|out| reply.encode(out),
        "01000500102700000700000000000000fe1f0000000000000900000000000000",
    );
    let setup = Setup {
        amount: ByteCount::new(4096),
        accept_partial: true,
        dynamic: true,
        name: "ab",
        credentials: b"c",
    };
    check(&|out| setup.encode(out), "00100000000000000300000002000100616263");
    let granted = GrantedSetup {
        granted: ByteCount::new(1),
        region: RegionId::new(2),
        pages: PageCount::new(3),
    };
    check(&|out| granted.encode(out), "010000000000000002000000000000000300000000000000");
    let attach = Attach { mode: AttachMode::TakeOver, replaces: 5 };
    check(&|out| attach.encode(out), "01000000000000000500000000000000");
    let malloc = Malloc { from: PageCount::new(1), add: PageCount::new(2) };
    check(&|out| malloc.encode(out), "01000000000000000200000000000000");
    let reply = MallocReply {
        address: ExternalAddress::from_raw(1),
        pages: PageCount::new(2),
        granted: ByteCount::new(3),
    };
    check(&|out| reply.encode(out), "010000000000000002000000000000000300000000000000");
    check(&|out| Slots { wanted: 258 }.encode(out), "02010000");
    let full = FullBody { asked: ByteCount::new(1), free: ByteCount::new(2) };
    check(&|out| full.encode(out), "01000000000000000200000000000000");
}

#[test]
fn named_region_body_bytes() {
    let check = |write: &dyn Fn(&mut Vec<u8>), expected: &str| {
        let mut out = Vec::new();
        write(&mut out);
        assert_eq!(hex(&out), expected);
    };
    let create = |source, prefers| {
        let size = ByteCount::new(8192);
        Create { name: "ab", size, page_bytes: 512, source, prefers }
    };
    let server = |writes_back| {
        let (address, region) = ("h:1", "cd");
        Source::Server { address, region, offset: 4096, writes_back }
    };
    for (source, prefers, expected) in [
        (
            Source::Nothing,
            None,
            "00200000000000000000000000000000000200000000000000000200000000006162",
        ),
        (
            Source::Fill(0xa5),
            Some(Tier::Dram),
            "00200000000000000000000000000000000200000100a50001000200000000006162",
        ),
        (
            Source::File { path: "/c", offset: 4096 },
            Some(Tier::Compressed),
            "002000000000000000100000000000000002000002000000020002000200000061622f63",
        ),
        (
            server(false),
            Some(Tier::File),
            "00200000000000000010000000000000000200000300000003000200030002006162683a316364",
        ),
        (
            server(true),
            None,
            "00200000000000000010000000000000000200000400000000000200030002006162683a316364",
        ),
    ] {
        check(&|out| create(source, prefers).encode(out), expected);
    }
    check(&|out| Resize { size: ByteCount::new(8192) }.encode(out), "0020000000000000");
    check(&|out| Delete { keeps_copies: true }.encode(out), "0100");
    check(&|out| Free { also_pinned: true }.encode(out), "0100");
    check(&|out| Prefer { tier: Some(Tier::File) }.encode(out), "0300");
    check(&|out| Open { take_over: true, name: "ab" }.encode(out), "010002006162");
    let copy = Copy { on_access: true, name: "ab", range: None };
    check(&|out| copy.encode(out), "010002006162");
    let range = Some(FileRange { path: "/c", offset: 4096 });
    let copy = Copy { on_access: true, name: "ab", range };
    check(&|out| copy.encode(out), "030002006162001000000000000002002f63");
    let range = Some(FileRange { path: "", offset: 4096 });
    let copy = Copy { on_access: false, name: "ab", range };
    check(&|out| copy.encode(out), "02000200616200100000000000000000");
    let taken = TakenBody { asked: 4096..8192, taken: 0..4097, holder: "ab".to_owned() };
    check(
        &|out| taken.encode(out),
        "001000000000000000200000000000000000000000000000011000000000000002006162",
    );
    check(&|out| List { after: RegionId::new(3) }.encode(out), "0300000000000000");
    let info = RegionInfo {
        region: RegionId::new(1),
        pages: PageCount::new(2),
        page_bytes: 4096,
        is_frozen: true,
        is_file: true,
        is_server: true,
        writes_back: true,
        is_unfilled: true,
        stored: PageCount::new(3),
        dirty: PageCount::new(4),
        changed: PageCount::new(5),
        pinned: PageCount::new(6),
        dram: PageCount::new(7),
        compressed: PageCount::new(8),
        file: PageCount::new(9),
        preferred: [10, 11, 12].map(PageCount::new),
        name: "ab".to_owned(),
        source: "/c".to_owned(),
    };
    check(
        &|out| info.encode(out),
        concat!(
            "010000000000000002000000000000000300000000000000040000000000000005000000000000000600000000000000",
            "0700000000000000080000000000000009000000000000000a000000000000000b000000000000000c00000000000000",
            "001000001f000200020061622f63",
        ),
    );
    let progress = Progress { changed: PageCount::new(1), next: Some((2, PageIndex::new(3))) };
    check(&|out| progress.encode(out), "0100000000000000030000000000000002000000");
    let progress = Progress { changed: PageCount::new(1), next: None };
    check(&|out| progress.encode(out), "01000000000000000000000000000000ffffffff");
    check(
        &|out| AskMap { from: PageIndex::new(1), since: 2, leases: true, news: false }.encode(out),
        "0100000000000000020000000000000001000000",
    );
    let reply = MapReply {
        stamp: 1,
        next: Some(PageIndex::new(2)),
        address: ExternalAddress::from_raw(3),
        absent: Absent::Fill(0xa5),
        is_all: true,
        is_outdated: false,
    };
    check(
        &|out| reply.encode(out),
        "0100000000000000020000000000000003000000000000000100a50001000000",
    );
}

/// Cap 93: what others have changed, ahead of a reply.
#[test]
fn news() {
    let check = |write: &dyn Fn(&mut Vec<u8>), expected: &str| {
        let mut out = Vec::new();
        write(&mut out);
        assert_eq!(hex(&out), expected);
    };
    let ask = AskMap { from: PageIndex::new(1), since: 2, leases: true, news: true };
    check(&|out| ask.encode(out), "0100000000000000020000000000000003000000");
    let range = PageRange { start: PageIndex::new(5), count: PageCount::new(6) };
    let stored = MapChange { range, version: Some(Version::new(7)) };
    check(
        &|out| stored.encode(out),
        "0500000000000000060000000000000007000000000000000100000000000000",
    );
    let absent = MapChange { range, version: None };
    check(
        &|out| absent.encode(out),
        "0500000000000000060000000000000000000000000000000000000000000000",
    );
    let reply = MapReply {
        stamp: 1,
        next: None,
        address: ExternalAddress::from_raw(3),
        absent: Absent::Nothing,
        is_all: false,
        is_outdated: true,
    };
    check(
        &|out| reply.encode(out),
        "0100000000000000ffffffffffffffff03000000000000000000000002000000",
    );
    let flags = Header { news: true, leased: true, ..header().granted() }.encode()[7];
    assert_eq!(flags, 7);
}

#[test]
fn stat_keeps_its_order() {
    let names = ServerStat::NAMES;
    assert_eq!(names[..4], ["memory_bytes", "reserved_bytes", "used_bytes", "sessions"]);
    assert_eq!(names.len(), 42, "new fields are appended, none is removed");
}

#[test]
fn sealed_message() {
    let mut message = vec![0; HEADER_BYTES];
    Hello { oldest: 1, newest: 1, share_arena: false }.encode(&mut message);
    seal(Header::request(Action::Hello, 1), &mut message);
    let expected = concat!(
        "4d534d50010001000100000000000000",
        "00000000000000000000000000000000",
        "00000000000000000000000000000000",
        "00000000000000000000000008000000",
        "0000000000000000",
        "b4a4242a",
        "dbe09029",
        "0100010000000000",
    );
    assert_eq!(hex(&message), expected);
}
