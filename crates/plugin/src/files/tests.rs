use super::*;
use engine::{Background, Engine, Parts, Settings, SimDisk, SystemClock};
use tables::{CollationId, Collations, Descriptor, TableImages};

struct NoText;
impl Collations for NoText {
    fn weights(&self, _: CollationId, text: &[u8], out: &mut Vec<u8>) {
        out.extend_from_slice(text);
    }
    fn level_weights(&self, _: CollationId, _: u32, text: &[u8], out: &mut Vec<u8>) {
        out.extend_from_slice(text);
    }
    fn prefix_bytes(&self, _: CollationId, text: &[u8], chars: usize) -> usize {
        chars.min(text.len())
    }
}

fn store() -> Arc<Store> {
    let parts = Parts {
        bucket: Arc::new(bucket::MemoryBucket::new()),
        disk: Arc::new(SimDisk::new(1)),
        clock: Arc::new(SystemClock::default()),
        seed: 1,
    };
    let settings = Settings { background: Background::Manual, ..Settings::default() };
    Store::open(Engine::open(parts, settings).unwrap(), Arc::new(NoText)).unwrap()
}

fn put(root: &Path, name: &str, text: &str) {
    let path = root.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

fn get(root: &Path, name: &str) -> Option<String> {
    fs::read_to_string(root.join(name)).ok()
}

/// A start on `root`, on a directory named `name` if it has to be filled.
fn open_as(root: &Path, store: &Arc<Store>, name: &str, continues: bool) -> FileMirror {
    FileMirror::restore(root, Arc::clone(store), continues, name).unwrap()
}

/// A start of the same machine after a crash; nobody else wrote since.
fn reopen(root: &Path, store: &Arc<Store>) -> FileMirror {
    open_as(root, store, "not needed", true)
}

/// What another machine gets.
fn elsewhere(store: &Arc<Store>) -> tempfile::TempDir {
    let there = tempfile::tempdir().unwrap();
    open_as(there.path(), store, "there", false);
    there
}

fn make_table(store: &Store, path: &str) {
    let nothing = Descriptor {
        record_length: 1,
        null_bytes: 1,
        fields: vec![],
        indexes: vec![],
        primary: None,
        auto_increment: None,
    };
    store.create(path, &nothing, TableImages::default(), 0).unwrap();
}

fn with_shop(store: &Arc<Store>) -> (tempfile::TempDir, FileMirror) {
    make_table(store, "shop/t");
    let here = tempfile::tempdir().unwrap();
    let mirror = open_as(here.path(), store, "here", false);
    put(here.path(), "shop/db.opt", "utf8mb4\n");
    put(here.path(), "shop/v.frm", "TYPE=VIEW\nquery=1");
    put(here.path(), "shop/t.TRG", "TYPE=TRIGGERS");
    put(here.path(), "shop/t.frm", "\u{1}CISTERN table");
    put(here.path(), "shop/r.TRN", "TYPE=TRIGGERNAME\ntrigger_table=t\n");
    put(here.path(), "shop/p.frm", "\u{1}partitioned");
    put(here.path(), "shop/p.par", "parts");
    mirror.sync().unwrap();
    (here, mirror)
}

/// All kept files, by name.
fn kept(root: &Path, store: &Arc<Store>) -> Found {
    let (state, changing) = (Mutex::default(), Mutex::default());
    FileMirror { root: root.to_owned(), store: Arc::clone(store), state, changing }.scan_all()
}

fn in_catalogue(store: &Store) -> Found {
    let mut copies = Found::new();
    let mut add = |name: &str, bytes: &[u8]| copies.insert(name.to_owned(), bytes.to_owned());
    store.files("", &mut |name, bytes| drop(add(name, bytes))).unwrap();
    copies.remove(SEAL);
    copies
}

fn crash(mirror: FileMirror) {
    drop(mirror);
}

#[test]
fn a_fresh_directory_gets_back_all_but_the_cached_definitions_of_tables() {
    let store = store();
    let (_here, _mirror) = with_shop(&store);
    let there = elsewhere(&store);
    for name in ["shop/db.opt", "shop/v.frm", "shop/t.TRG", "shop/p.frm", "shop/p.par"] {
        assert!(get(there.path(), name).is_some(), "{name}");
    }
    assert_eq!(get(there.path(), "shop/t.frm"), None);
}

#[test]
fn what_a_server_had_before_it_met_the_engine_is_adopted() {
    let store = store();
    let here = tempfile::tempdir().unwrap();
    for name in ["test/db.opt", "test/v.frm", "ddl_recovery.log"] {
        put(here.path(), name, "TYPE=VIEW\n");
    }
    fs::create_dir(here.path().join("empty")).unwrap();
    open_as(here.path(), &store, "here", false);
    assert_eq!(in_catalogue(&store).keys().collect::<Vec<_>>(), ["test/db.opt", "test/v.frm"]);
    assert!(here.path().join("empty").exists());
    assert_eq!(kept(elsewhere(&store).path(), &store), in_catalogue(&store));

    // Not by the next catalogue: the directory has a history.
    open_as(here.path(), &self::store(), "here", false);
    assert_eq!(kept(here.path(), &store), Found::new());
}

#[test]
fn triggers_of_a_table_that_is_gone_do_not_wait_for_the_next_one_of_its_name() {
    let store = store();
    let (_here, mirror) = with_shop(&store);
    crash(mirror);
    store.drop_table("shop/t").unwrap(); // the last that reached the bucket
    let there = elsewhere(&store);
    assert_eq!(get(there.path(), "shop/t.TRG"), None);
    assert_eq!(get(there.path(), "shop/r.TRN"), None);
    assert_eq!(in_catalogue(&store), kept(there.path(), &store));
    assert!(get(there.path(), "shop/v.frm").is_some());
}

#[test]
fn changes_and_removals_while_running_reach_the_catalogue() {
    let store = store();
    let (here, mirror) = with_shop(&store);
    put(here.path(), "shop/v.frm", "TYPE=VIEW\nquery=22");
    fs::remove_file(here.path().join("shop/t.TRG")).unwrap();
    put(here.path(), "other/db.opt", "latin1\n");
    mirror.sync().unwrap();
    let there = elsewhere(&store);
    assert_eq!(get(there.path(), "shop/v.frm").as_deref(), Some("TYPE=VIEW\nquery=22"));
    assert_eq!(get(there.path(), "shop/t.TRG"), None);
    assert_eq!(get(there.path(), "other/db.opt").as_deref(), Some("latin1\n"));
}

#[test]
fn whatever_was_done_just_before_a_crash_counts_on_the_same_machine() {
    let store = store();
    let (here, mirror) = with_shop(&store);
    put(here.path(), "old/db.opt", "latin1\n");
    put(here.path(), "old/w.frm", "TYPE=VIEW\nquery=old");
    mirror.sync().unwrap();

    mirror.statement_begins();
    put(here.path(), "shop/v.frm", "TYPE=VIEW\nquery=3");
    put(here.path(), "shop/w.frm", "TYPE=VIEW\nquery=new");
    put(here.path(), "shop/db.opt", "latin1\n");
    fs::remove_file(here.path().join("shop/t.TRG")).unwrap();
    put(here.path(), "new/db.opt", "latin1\n");
    mirror.drop_database("old").unwrap();
    fs::remove_dir_all(here.path().join("old")).unwrap();
    let before = kept(here.path(), &store);
    crash(mirror);

    reopen(here.path(), &store);
    assert_eq!(kept(here.path(), &store), before, "nothing acknowledged is undone");
    assert_eq!(in_catalogue(&store), before);
    assert!(!here.path().join("old").exists());
}

#[test]
fn a_crash_between_the_seal_here_and_the_seal_there_loses_nothing() {
    let store = store();
    let (here, mirror) = with_shop(&store);
    let seal = mirror.state.lock().seal.next();
    mirror.write_marker(&seal).unwrap();
    crash(mirror);
    put(here.path(), "shop/v.frm", "TYPE=VIEW\nquery=last");
    reopen(here.path(), &store);
    assert_eq!(in_catalogue(&store)["shop/v.frm"], b"TYPE=VIEW\nquery=last");
}

#[test]
fn a_database_whose_directory_is_lost_comes_back() {
    // `rm -r` of the directory, and of what is in it.
    for emptied in [false, true] {
        let store = store();
        let (here, mirror) = with_shop(&store);
        let before = kept(here.path(), &store);
        mirror.statement_begins();
        crash(mirror);
        fs::remove_dir_all(here.path().join("shop")).unwrap();
        if emptied {
            fs::create_dir(here.path().join("shop")).unwrap();
        }
        put(here.path(), "late/db.opt", "latin1\n");
        reopen(here.path(), &store);
        let after = kept(here.path(), &store);
        assert!(before.iter().all(|(name, bytes)| after.get(name) == Some(bytes)), "emptied: {emptied}");
        assert_eq!(in_catalogue(&store), after, "and what was new elsewhere in the directory is not lost");
        assert!(after.contains_key("late/db.opt"));

        let mirror = reopen(here.path(), &store);
        mirror.statement_begins();
        fs::remove_file(here.path().join("shop/v.frm")).unwrap();
        crash(mirror);
        reopen(here.path(), &store);
        assert!(!in_catalogue(&store).contains_key("shop/v.frm"), "the directory counts again");
    }
}

#[test]
fn a_file_that_is_lost_while_no_statement_ran_comes_back() {
    let store = store();
    let (here, mirror) = with_shop(&store);
    mirror.statement_begins();
    mirror.statement_begins();
    mirror.statement_ends(true).unwrap();
    assert_eq!(get(here.path(), CHANGING).as_deref(), Some("1"), "the other one goes on");
    mirror.statement_ends(false).unwrap();
    crash(mirror);
    let before = kept(here.path(), &store);
    for name in ["shop/v.frm", "shop/t.TRG", "shop/p.frm"] {
        fs::remove_file(here.path().join(name)).unwrap();
    }
    reopen(here.path(), &store);
    assert_eq!(kept(here.path(), &store), before);
    assert_eq!(in_catalogue(&store), before);
}

#[test]
fn options_that_a_crash_cut_in_half_are_the_old_ones() {
    let store = store();
    let (here, mirror) = with_shop(&store);
    put(here.path(), "shop/db.opt", "");
    mirror.sync().unwrap();
    assert_eq!(in_catalogue(&store)["shop/db.opt"], b"utf8mb4\n");
    crash(mirror);
    reopen(here.path(), &store);
    assert_eq!(get(here.path(), "shop/db.opt").as_deref(), Some("utf8mb4\n"));
    assert_eq!(in_catalogue(&store)["shop/db.opt"], b"utf8mb4\n");
}

/// A directory with a view that nobody else may see, and a change that must not count.
fn with_late_changes(here: &Path) {
    put(here, "shop/v.frm", "TYPE=VIEW\nquery=ours, late");
    put(here, "gone/db.opt", "late too\n");
    fs::remove_file(here.join("shop/t.TRG")).unwrap();
}

#[test]
fn the_catalogue_counts_whenever_the_directory_may_be_old() {
    type Doubt<'a> = (&'a str, bool, &'a dyn Fn(&Path, &Arc<Store>, FileMirror));
    let doubts: [Doubt; 5] = [
        ("another engine wrote between", false, &|_, _, mirror| crash(mirror)),
        ("no seal", true, &|here, _, mirror| {
            crash(mirror);
            fs::remove_file(here.join(MARKER)).unwrap();
        }),
        ("a garbled seal", true, &|here, _, mirror| {
            crash(mirror);
            put(here, MARKER, "\u{0}\u{0}");
        }),
        ("another directory was filled since", true, &|_, store, mirror| {
            crash(mirror);
            elsewhere(store);
        }),
        ("an old copy of the directory", true, &|here, _, mirror| {
            let seal = get(here, MARKER).unwrap();
            put(here, "shop/u.frm", "TYPE=VIEW\nquery=u");
            mirror.sync().unwrap();
            crash(mirror);
            fs::remove_file(here.join("shop/u.frm")).unwrap();
            put(here, MARKER, &seal);
        }),
    ];
    for (why, continues, doubt) in doubts {
        let store = store();
        let (here, mirror) = with_shop(&store);
        doubt(here.path(), &store, mirror);
        let truth = in_catalogue(&store);
        with_late_changes(here.path());
        open_as(here.path(), &store, "here, again", continues);
        assert_eq!(in_catalogue(&store), truth, "{why}");
        assert_eq!(kept(here.path(), &store), truth, "{why}");
        assert!(!here.path().join("gone").exists(), "{why}");
    }
}

#[test]
fn a_directory_that_was_not_filled_to_the_end_does_not_count() {
    let store = store();
    let (here, mirror) = with_shop(&store);
    let truth = in_catalogue(&store);
    crash(mirror);
    // Lost, and in the way of the third of five files that are to be written.
    fs::remove_dir_all(here.path().join("shop")).unwrap();
    fs::create_dir_all(here.path().join("shop/p.par/in the way")).unwrap();
    let failed = FileMirror::restore(here.path(), Arc::clone(&store), true, "again");
    assert!(matches!(failed, Err(Failure::File(path, _)) if path.ends_with("shop/p.par")));
    assert!(get(here.path(), "shop/db.opt").is_some() && get(here.path(), "shop/v.frm").is_none());

    fs::remove_dir_all(here.path().join("shop/p.par")).unwrap();
    reopen(here.path(), &store);
    assert_eq!(kept(here.path(), &store), truth);
    assert_eq!(in_catalogue(&store), truth);
}

#[test]
fn half_done_ddl_of_a_directory_that_was_overtaken_is_forgotten() {
    let store = store();
    let (here, mirror) = with_shop(&store);
    crash(mirror);
    let log = here.path().join("ddl_recovery.log");
    let body = [vec![7; 4096], vec![b'e'; 8192]].concat();
    fs::write(&log, &body).unwrap();
    crash(reopen(here.path(), &store));
    assert_eq!(fs::read(&log).unwrap(), body, "the server finishes its own");
    open_as(here.path(), &store, "overtaken", false);
    assert_eq!(fs::read(&log).unwrap(), [vec![7; 4096], vec![0; 8192]].concat());
}

#[test]
fn a_database_that_is_dropped_and_made_again_at_once_is_not_forgotten() {
    let store = store();
    let (here, mirror) = with_shop(&store);
    mirror.drop_database("shop").unwrap();
    fs::remove_dir_all(here.path().join("shop")).unwrap();
    put(here.path(), "shop/db.opt", "utf8mb4\n"); // before anybody looked
    mirror.sync().unwrap();
    assert_eq!(in_catalogue(&store).keys().collect::<Vec<_>>(), ["shop/db.opt"]);
}

#[test]
fn schema_options_that_are_rewritten_in_place_are_noticed() {
    let store = store();
    let (here, mirror) = with_shop(&store);
    mirror.pass(true).unwrap();
    mirror.pass(true).unwrap();
    put(here.path(), "shop/db.opt", "latin1_bin\n");
    mirror.sync().unwrap();
    assert_eq!(store.file_get("shop/db.opt").unwrap().as_deref(), Some(&b"latin1_bin\n"[..]));
}
