//! Which statements may remove a file that is not a table's, judged by their first words, before the server parses them.
//!
//! * Yes may be wrong, no may not: between the removal and its copy in the catalogue a crash must find that removals were under way.

/// Statements that leave the files alone, by their first word.
const HARMLESS: [&[u8]; 27] = [
    b"SELECT",
    b"INSERT",
    b"UPDATE",
    b"DELETE",
    b"REPLACE",
    b"SET",
    b"COMMIT",
    b"ROLLBACK",
    b"START",
    b"SHOW",
    b"USE",
    b"WITH",
    b"DESC",
    b"DESCRIBE",
    b"SAVEPOINT",
    b"RELEASE",
    b"DO",
    b"VALUES",
    b"LOAD",
    b"LOCK",
    b"UNLOCK",
    b"FLUSH",
    b"CHECK",
    b"KILL",
    b"GRANT",
    b"REVOKE",
    b"BEGIN",
];

/// `many`: the client may send several statements at once.
pub fn may_remove_files(text: &[u8], many: bool) -> bool {
    let (first, rest) = word(text);
    let harmless = HARMLESS.iter().any(|word| word.eq_ignore_ascii_case(first));
    // BEGIN NOT ATOMIC … END, and SET STATEMENT … FOR ….
    let second = || word(rest).0;
    let carries_another = (first.eq_ignore_ascii_case(b"BEGIN") && second().eq_ignore_ascii_case(b"NOT"))
        || (first.eq_ignore_ascii_case(b"SET") && second().eq_ignore_ascii_case(b"STATEMENT"));
    !harmless || carries_another || (many && another_follows(rest))
}

fn another_follows(text: &[u8]) -> bool {
    let end = text.iter().position(|byte| *byte == b';');
    end.is_some_and(|end| {
        !text[end..].iter().all(|byte| *byte == b';' || byte.is_ascii_whitespace() || *byte == 0)
    })
}

/// The first word after blanks, brackets and comments, and what follows it. Empty if a comment may be more than one.
fn word(text: &[u8]) -> (&[u8], &[u8]) {
    let mut rest = text;
    loop {
        rest = rest.trim_ascii_start();
        let end: &[u8] = match rest {
            [b'(', after @ ..] => {
                rest = after;
                continue;
            }
            [b'/', b'*', b'!', ..] | [b'/', b'*', b'M', b'!', ..] => return (&[], rest),
            [b'/', b'*', ..] => b"*/",
            [b'-', b'-', ..] | [b'#', ..] => b"\n",
            _ => break,
        };
        let Some(at) = rest.windows(end.len()).position(|bytes| bytes == end) else { return (&[], &[]) };
        rest = &rest[at + end.len()..];
    }
    let end = rest.iter().position(|byte| !byte.is_ascii_alphabetic()).unwrap_or(rest.len());
    rest.split_at(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_remove_a_file_is_told_by_its_first_words() {
        for harmless in [
            "SELECT 1",
            "  select * from t",
            "(SELECT 1) UNION (SELECT 2)",
            "BEGIN",
            "begin work",
            "COMMIT",
            "/* application */ INSERT INTO t VALUES (1)",
            "-- why\nUPDATE t SET v = 1",
            "SET autocommit = 0",
            "INSERT INTO t VALUES (1);  ",
        ] {
            assert!(!may_remove_files(harmless.as_bytes(), true), "{harmless}");
        }
        for other in [
            "DROP VIEW v",
            "drop trigger r",
            "CREATE OR REPLACE VIEW v AS SELECT 1",
            "CALL p()",
            "EXECUTE s",
            "",
            "BEGIN NOT ATOMIC DROP VIEW v; END",
            "SET STATEMENT max_statement_time = 1 FOR DROP VIEW v",
            "/*!50000 DROP VIEW v */",
            "SELECT 1; DROP VIEW v",
            "/* open",
            "ALTER DATABASE d CHARACTER SET latin1",
        ] {
            assert!(may_remove_files(other.as_bytes(), true), "{other}");
        }
        assert!(!may_remove_files(b"INSERT INTO t VALUES ('a;b')", false));
    }
}
