//! PostgreSQL's regression tests, from Debian's source package, against Debian's server. It refuses to
//! run as root.

use std::fs;
use std::time::Duration;

use anyhow::Context;

use super::{Cache, Case, Ended, Prepared, Verdicts, own, version_of};

const PATIENCE: Duration = Duration::from_secs(900);

const USER: &str = "postgres";

const VERSION: &str = "15";

/// The library of functions that the tests load. The server's own modules are looked for beside it.
const BUILD: &str = "cd src/test/regress && \
                     gcc -w -O2 -fPIC -shared -I\"$(/usr/lib/postgresql/15/bin/pg_config \
                     --includedir-server)\" -I. regress.c -o regress.so && \
                     cp /usr/lib/postgresql/15/lib/autoinc.so /usr/lib/postgresql/15/lib/refint.so .";

/// What all other tests may rest on, in this order; a line runs at a time.
const FOUNDATION: [&str; 4] = [
    "test_setup",
    "copy copyselect copydml insert insert_conflict",
    "create_function_c create_misc create_operator create_procedure create_table create_type \
     create_schema",
    "create_index create_index_spgist create_view index_including index_including_gist",
];

/// The other tests, as the suite's own schedule has them together.
const GROUPS: [(&str, &[&str]); 6] = [
    (
        "types",
        &[
            "boolean char name varchar text int2 int4 int8 oid float4 float8 bit numeric txid uuid \
             enum money rangetypes pg_lsn regproc",
            "strings numerology point lseg line box path polygon circle date time timetz timestamp \
             timestamptz interval inet macaddr macaddr8 multirangetypes",
            "geometry horology tstypes regex type_sanity opr_sanity misc_sanity comments \
             expressions unicode xid mvcc database encoding euc_kr",
        ],
    ),
    (
        "tables",
        &[
            "create_aggregate create_function_sql create_cast constraints triggers select inherit \
             typed_table vacuum drop_if_exists updatable_views roleattributes create_am hash_func \
             errors infinite_recurse",
            "sanity_check",
        ],
    ),
    (
        "queries",
        &[
            "select_into select_distinct select_distinct_on select_implicit select_having subselect \
           union case join aggregates transactions portals arrays btree_index hash_index update \
           delete namespace prepared_xacts",
        ],
    ),
    (
        "indexes and rights",
        &[
            "brin gin gist spgist privileges init_privs security_label collate matview lock \
             replica_identity rowsecurity object_address tablesample groupingsets drop_operator \
             password identity generated join_hash",
            "brin_bloom brin_multi",
            "create_table_like alter_generic alter_operator misc async dbsize merge misc_functions \
             sysviews tsrf tid tidscan tidrangescan collate.icu.utf8 incremental_sort create_role",
            "rules psql psql_crosstab amutils stats_ext collate.linux.utf8",
        ],
    ),
    (
        "parallel and json",
        &[
            "select_parallel",
            "write_parallel",
            "vacuum_parallel",
            "publication subscription",
            "select_views portals_p2 foreign_key cluster dependency guc bitmapops combocid tsearch \
             tsdicts foreign_data window xmlmap functional_deps advisory_lock indirect_toast \
             equivclass",
            "json jsonb json_encoding jsonpath jsonpath_encoding jsonb_jsonpath",
        ],
    ),
    (
        "language and partitions",
        &[
            "plancache limit plpgsql copy2 temp domain rangefuncs prepare conversion truncate \
             alter_table sequence polymorphism rowtypes returning largeobject with xml",
            "partition_join partition_prune reloptions hash_part indexing partition_aggregate \
             partition_info tuplesort explain memoize stats",
            "compression compression_pglz",
            "event_trigger oidjoins",
            "fast_default",
        ],
    ),
];

pub(super) fn prepare(cache: &Cache) -> anyhow::Result<Prepared> {
    let (server, driver) =
        (format!("postgresql-{VERSION}"), format!("postgresql-server-dev-{VERSION}"));
    cache.packages(&[&server, &driver, "util-linux"])?;
    let tree = cache.source(&server, BUILD)?;
    let sources = tree.join("src/test/regress").display().to_string();
    let folder = format!("/usr/lib/postgresql/{VERSION}");
    let driver = format!("{folder}/lib/pgxs/src/test/regress/pg_regress");
    let cases = GROUPS.map(|(name, lines)| {
        let lines = FOUNDATION.iter().chain(lines).map(|line| format!("test: {line}\n"));
        let binaries = format!("{folder}/bin");
        let command =
            ["sh".to_owned(), own("postgres.sh"), binaries, driver.clone(), sources.clone()];
        let mut case = Case::new(
            format!("postgres: {name}"),
            command.into_iter().chain([lines.collect()]),
            PATIENCE,
            read,
        );
        case.user = Some(USER);
        case
    });
    let name = tree.file_name().unwrap_or_default().display();
    let source = format!("regression tests of {name} against the server {}", version_of(&server)?);
    Ok((source, cases.into()))
}

/// `     name ... ok 12 ms`, `test name ... FAILED 12 ms`. What a failed test printed otherwise must be
/// the same too: its part of the differences is told by its digest.
fn read(ended: &Ended) -> anyhow::Result<Verdicts> {
    let text = fs::read(&ended.outcome.output).context("read the output")?;
    let mut verdicts = Verdicts::new();
    for line in String::from_utf8_lossy(&text).lines() {
        let Some((name, rest)) = line.split_once(" ... ") else { continue };
        let name = name.trim().trim_start_matches("test ").trim();
        let verdict = match rest.trim_end_matches(" ms").trim_end_matches(char::is_numeric).trim() {
            "FAILED" => format!("FAILED {}", digest_of(ended, name)),
            verdict => verdict.to_owned(),
        };
        verdicts.insert(name.to_owned(), verdict);
    }
    Ok(verdicts)
}

/// Of what a test printed.
fn digest_of(ended: &Ended, test: &str) -> String {
    let file = ended.folder.join("results").join(format!("{test}.out"));
    crate::stage::digest(&file).map_or_else(|_| "without output".to_owned(), |d| d[..12].to_owned())
}
