//! A company's database as `mariadb-dump` would write it: made from a seed, a million rows at scale 1.
//!
//! * Tables with every common type, foreign keys, views, triggers, procedures, functions and an event, all said to be InnoDB.
//! * The same seed and scale make the same bytes, so two servers can be compared.

use std::fmt::Write as _;
use std::io::{self, Write};

/// Splitmix64: small, seeded, the same everywhere (Steele, Lea, Flood 2014).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A sequence of its own for each seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }
    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// A number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.bits() % limit
    }
    fn pick<'a>(&mut self, words: &[&'a str]) -> &'a str {
        words[self.below(words.len() as u64) as usize]
    }
}

const FIRST: [&str; 20] = [
    "Ada", "Bojan", "Chloé", "Dương", "Elif", "Fatou", "Günther", "Hana", "Ines", "Jörg", "Kofi", "Li",
    "Márta", "Nils", "Olga", "Påske", "Quentin", "Rosa", "Søren", "Tomás",
];
const LAST: [&str; 16] = [
    "Abe", "Brandt", "Çelik", "Dubois", "Eriksen", "Færch", "García", "Hoffmann", "Ivanova", "Jansen",
    "Kowalski", "Lund", "Müller", "Nakamura", "O'Neil", "Peña",
];
const TITLES: [&str; 6] =
    ["Engineer", "Senior Engineer", "Staff", "Manager", "Technique Leader", "Assistant"];
const DEPARTMENTS: [&str; 9] = [
    "Marketing",
    "Finance",
    "Human Resources",
    "Production",
    "Development",
    "Quality",
    "Sales",
    "Research",
    "Service",
];

const SCHEMA: &str = r"
CREATE TABLE `department` (
  `id` char(4) NOT NULL, `name` varchar(40) NOT NULL, `budget` decimal(14,2) DEFAULT NULL,
  PRIMARY KEY (`id`), UNIQUE KEY `name` (`name`)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_general_ci;
CREATE TABLE `employee` (
  `id` int(11) NOT NULL AUTO_INCREMENT, `birth` date NOT NULL, `first` varchar(30) NOT NULL, `last` varchar(30) NOT NULL,
  `gender` enum('M','F','X') NOT NULL, `hired` datetime(3) NOT NULL, `skills` set('sql','rust','c++','french') DEFAULT NULL,
  `notes` text DEFAULT NULL, `rating` double DEFAULT NULL, `profile` longtext DEFAULT NULL CHECK (json_valid(`profile`)),
  `badge` binary(8) NOT NULL, `active` bit(1) NOT NULL DEFAULT b'1',
  PRIMARY KEY (`id`), UNIQUE KEY `badge` (`badge`), KEY `name` (`last`,`first`), KEY `hired` (`hired` DESC), KEY `notes` (`notes`(12))
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_general_ci;
CREATE TABLE `assignment` (
  `employee` int(11) NOT NULL, `department` char(4) NOT NULL, `since` date NOT NULL, `until` date DEFAULT NULL,
  PRIMARY KEY (`employee`,`department`), KEY `department` (`department`,`since`),
  CONSTRAINT `a1` FOREIGN KEY (`employee`) REFERENCES `employee` (`id`), CONSTRAINT `a2` FOREIGN KEY (`department`) REFERENCES `department` (`id`)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_general_ci;
CREATE TABLE `title` (
  `employee` int(11) NOT NULL, `title` varchar(50) NOT NULL, `since` date NOT NULL, `until` date DEFAULT NULL,
  PRIMARY KEY (`employee`,`title`,`since`), KEY `title` (`title`)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_unicode_ci;
CREATE TABLE `salary` (
  `employee` int(11) NOT NULL, `since` date NOT NULL, `until` date NOT NULL, `amount` int(10) unsigned NOT NULL,
  `bonus` decimal(9,3) DEFAULT NULL, PRIMARY KEY (`employee`,`since`), KEY `amount` (`amount`), KEY `bonus` (`bonus`,`amount`)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_general_ci;
CREATE TABLE `event_log` (
  `at` timestamp(6) NOT NULL DEFAULT current_timestamp(6), `what` varchar(200) NOT NULL, `took` time(3) DEFAULT NULL,
  `year` year(4) DEFAULT NULL, `size` bigint(20) unsigned DEFAULT NULL, `ratio` float DEFAULT NULL, KEY `what` (`what`), KEY `at` (`at`)
) ENGINE=InnoDB DEFAULT CHARSET=latin1 COLLATE=latin1_swedish_ci;
CREATE TABLE `change_log` (`id` bigint(20) NOT NULL AUTO_INCREMENT, `employee` int(11) NOT NULL, `was` int(10) unsigned, `now` int(10) unsigned, PRIMARY KEY (`id`)) ENGINE=InnoDB;
";

const PROGRAMS: &str = r"
DELIMITER ;;
CREATE TRIGGER `salary_changed` AFTER UPDATE ON `salary` FOR EACH ROW
BEGIN
  IF OLD.amount <> NEW.amount THEN INSERT INTO change_log (employee, was, now) VALUES (NEW.employee, OLD.amount, NEW.amount); END IF;
END;;
CREATE TRIGGER `employee_name` BEFORE INSERT ON `employee` FOR EACH ROW SET NEW.last = TRIM(NEW.last);;
CREATE FUNCTION `age_at_hire`(b DATE, h DATETIME) RETURNS int DETERMINISTIC RETURN TIMESTAMPDIFF(YEAR, b, h);;
CREATE PROCEDURE `raise`(IN who INT, IN percent INT)
BEGIN
  UPDATE salary SET amount = amount + amount * percent DIV 100 WHERE employee = who AND until = '9999-01-01';
END;;
CREATE EVENT `tidy` ON SCHEDULE EVERY 1 DAY DISABLE DO DELETE FROM change_log WHERE id < 0;;
DELIMITER ;
CREATE VIEW `current_assignment` AS SELECT employee, department, since FROM assignment WHERE until IS NULL;
CREATE VIEW `current_pay` AS SELECT e.id, e.first, e.last, s.amount, s.bonus FROM employee e JOIN salary s ON s.employee = e.id AND s.until = '9999-01-01';
";

/// Writes the dump: about `scale` million rows in all.
pub fn dump(out: &mut dyn Write, scale: f64, seed: u64) -> io::Result<()> {
    let random = &mut Random::new(seed);
    let employees = (160_000.0 * scale) as u64;
    writeln!(
        out,
        "/*!40101 SET NAMES utf8mb4 */;\n/*!40014 SET @OLD_FOREIGN_KEY_CHECKS=@@FOREIGN_KEY_CHECKS, FOREIGN_KEY_CHECKS=0 */;"
    )?;
    writeln!(
        out,
        "/*!40101 SET @OLD_SQL_MODE=@@SQL_MODE, SQL_MODE='NO_AUTO_VALUE_ON_ZERO' */;\nSET TIME_ZONE='+00:00';"
    )?;
    writeln!(
        out,
        "CREATE DATABASE `company` /*!40100 DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_general_ci */;\nUSE `company`;"
    )?;
    out.write_all(SCHEMA.as_bytes())?;
    let mut table = Inserts::new(out, "department");
    for (index, name) in DEPARTMENTS.iter().enumerate() {
        table.row(&format!(
            "'d{index:03}','{name}',{}.{:02}",
            100_000 + random.below(900_000),
            random.below(100)
        ))?;
    }
    table.end()?;
    let mut table = Inserts::new(out, "employee");
    for id in 1..=employees {
        table.row(&employee(id, random))?;
    }
    table.end()?;
    let mut table = Inserts::new(out, "assignment");
    for id in 1..=employees {
        let first = random.below(9);
        let since = date(random, 1990, 10);
        table.row(&format!(
            "{id},'d{first:03}','{since}',{}",
            if id % 9 == 0 { "'2005-06-07'" } else { "NULL" }
        ))?;
        if id % 9 == 0 {
            table.row(&format!("{id},'d{:03}','2005-06-07',NULL", (first + 1) % 9))?;
        }
    }
    table.end()?;
    let mut table = Inserts::new(out, "title");
    for id in 1..=employees {
        let title = random.pick(&TITLES);
        table.row(&format!("{id},'{title}','{}',NULL", date(random, 1990, 20)))?;
    }
    table.end()?;
    let mut table = Inserts::new(out, "salary");
    for id in 1..=employees {
        let raises = 2 + random.below(3);
        for raise in 0..raises {
            let until =
                if raise + 1 == raises { "9999-01-01".to_owned() } else { format!("{}-03-01", 2001 + raise) };
            let bonus = if random.below(3) == 0 {
                "NULL".to_owned()
            } else {
                format!("{}.{:03}", random.below(9_999), random.below(1_000))
            };
            table.row(&format!(
                "{id},'{}-03-01','{until}',{},{bonus}",
                2000 + raise,
                30_000 + random.below(90_000)
            ))?;
        }
    }
    table.end()?;
    let mut table = Inserts::new(out, "event_log");
    for n in 0..employees * 2 / 3 {
        let (hour, minute) = (random.below(24), random.below(60));
        table.row(&format!(
            "'{} {hour:02}:{minute:02}:{:02}.{:06}','{} #{}','{}{:02}:{minute:02}:00.{:03}',{},{},{}",
            date(random, 2000, 20),
            random.below(60),
            random.below(1_000_000),
            random.pick(&["login", "export", "Import", "PRINT "]),
            random.below(5_000),
            if n % 7 == 0 { "-" } else { "" },
            random.below(800),
            random.below(1_000),
            1970 + random.below(80),
            random.bits(),
            (random.below(2_000) as f64 - 1_000.0) / 8.0,
        ))?;
    }
    table.end()?;
    out.write_all(PROGRAMS.as_bytes())?;
    writeln!(
        out,
        "/*!40101 SET SQL_MODE=@OLD_SQL_MODE */;\n/*!40014 SET FOREIGN_KEY_CHECKS=@OLD_FOREIGN_KEY_CHECKS */;"
    )
}

/// Queries whose answers two servers must agree on, to the letter. Each orders its rows completely.
pub const QUERIES: [&str; 30] = [
    "SELECT COUNT(*), MIN(id), MAX(id), SUM(CRC32(CONCAT_WS('|', id, birth, first, last, gender, hired, skills, notes, rating, profile, HEX(badge), active+0))) FROM employee",
    "SELECT COUNT(*), SUM(CRC32(CONCAT_WS('|', employee, since, until, amount, bonus))) FROM salary",
    "SELECT COUNT(*), SUM(CRC32(CONCAT_WS('|', at, what, took, year, size, ratio))) FROM event_log",
    "SELECT d.name, COUNT(*), SUM(s.amount) FROM department d JOIN current_assignment a ON a.department = d.id JOIN current_pay s ON s.id = a.employee GROUP BY d.name ORDER BY d.name",
    "SELECT title, COUNT(*), AVG(amount) FROM title JOIN salary ON salary.employee = title.employee AND salary.until = '9999-01-01' GROUP BY title ORDER BY title",
    "SELECT gender, YEAR(hired) y, COUNT(*) FROM employee GROUP BY gender, y ORDER BY gender, y",
    "SELECT id, first, last FROM employee WHERE last = 'müller' AND first LIKE 'j%' ORDER BY id LIMIT 50",
    "SELECT id, last FROM employee WHERE last BETWEEN 'f' AND 'h' ORDER BY last DESC, first DESC, id DESC LIMIT 100",
    "SELECT id, hired FROM employee ORDER BY hired DESC, id LIMIT 25",
    "SELECT id, hired FROM employee WHERE hired < '1991-01-01' ORDER BY hired, id LIMIT 25",
    "SELECT amount, COUNT(*) c FROM salary WHERE amount BETWEEN 50000 AND 50500 GROUP BY amount ORDER BY c DESC, amount LIMIT 40",
    "SELECT bonus, amount, employee FROM salary WHERE bonus > 9990 ORDER BY bonus, amount, employee LIMIT 60",
    "SELECT COUNT(*) FROM salary WHERE bonus IS NULL",
    "SELECT MIN(bonus), MAX(bonus), SUM(bonus) FROM salary",
    "SELECT e.id, COUNT(s.since) n, MAX(s.amount) FROM employee e LEFT JOIN salary s ON s.employee = e.id WHERE e.id % 1009 = 0 GROUP BY e.id ORDER BY e.id",
    "SELECT what, COUNT(*) c FROM event_log GROUP BY what ORDER BY c DESC, what LIMIT 30",
    "SELECT what, size FROM event_log WHERE what = 'print  #77' OR what = 'LOGIN #1' ORDER BY what, size",
    "SELECT YEAR(at) y, MIN(took), MAX(took), MAX(size) FROM event_log GROUP BY y ORDER BY y",
    "SELECT year, COUNT(*), SUM(ratio) FROM event_log GROUP BY year ORDER BY year",
    "SELECT at, size FROM event_log WHERE at BETWEEN '2003-05-01' AND '2003-05-03' ORDER BY at, size LIMIT 200",
    "SELECT skills, COUNT(*) FROM employee GROUP BY skills ORDER BY skills+0, COUNT(*)",
    "SELECT JSON_VALUE(profile, '$.level') l, COUNT(*) FROM employee GROUP BY l ORDER BY l",
    "SELECT id, notes FROM employee WHERE notes LIKE 'likes c%' ORDER BY notes, id LIMIT 50",
    "SELECT HEX(badge), id FROM employee WHERE badge > X'F000000000000000' ORDER BY badge LIMIT 40",
    "SELECT age_at_hire(birth, hired) a, COUNT(*) FROM employee GROUP BY a ORDER BY a",
    "SELECT department, COUNT(DISTINCT employee) FROM assignment WHERE since >= '1995-01-01' GROUP BY department ORDER BY department",
    "SELECT e1.last, COUNT(*) FROM employee e1 JOIN employee e2 ON e2.last = e1.last AND e2.first = e1.first AND e2.id = e1.id + 160 GROUP BY e1.last ORDER BY e1.last",
    "WITH ranked AS (SELECT employee, amount, RANK() OVER (PARTITION BY since ORDER BY amount DESC, employee) r, since FROM salary) SELECT since, employee, amount FROM ranked WHERE r <= 5 ORDER BY since, r, employee",
    "SELECT id FROM employee WHERE id IN (SELECT employee FROM salary WHERE amount > 119900) AND NOT EXISTS (SELECT 1 FROM assignment a WHERE a.employee = employee.id AND a.until IS NOT NULL) ORDER BY id LIMIT 100",
    "SELECT rating > 4.5 r, active+0, COUNT(*), ROUND(SUM(rating), 6) FROM employee GROUP BY r, active ORDER BY r, active",
];

/// Statements that change things, for both servers, before the queries are asked once more.
pub const CHANGES: [&str; 10] = [
    "CALL raise(77, 10)",
    "UPDATE salary SET amount = amount + 1 WHERE employee BETWEEN 1000 AND 1999",
    "DELETE FROM title WHERE title = 'Assistant' AND employee % 3 = 0",
    "INSERT INTO employee (birth, first, last, gender, hired, badge) VALUES ('1980-01-01', 'New', '  Person ', 'X', '2020-01-01', 'zzzzzzzz')",
    "INSERT INTO department VALUES ('d001', 'Money', 1) ON DUPLICATE KEY UPDATE budget = budget + 1",
    "REPLACE INTO title VALUES (5, 'Engineer', '1999-01-01', NULL)",
    "INSERT INTO event_log (at, what, size) SELECT '2024-01-01', CONCAT('copy ', what), size FROM event_log WHERE what LIKE 'export #1%'",
    "ALTER TABLE title ADD COLUMN seen INT NOT NULL DEFAULT 7, ADD KEY (since)",
    "UPDATE employee SET last = 'Zorn', notes = NULL WHERE id % 5000 = 1",
    "DELETE s FROM salary s JOIN employee e ON e.id = s.employee WHERE e.last = 'Zorn' AND s.until <> '9999-01-01'",
];

fn employee(id: u64, random: &mut Random) -> String {
    let (first, last) = (random.pick(&FIRST), random.pick(&LAST).replace('\'', "\\'"));
    let skills = match random.below(6) {
        0 => "NULL".to_owned(),
        1 => "''".to_owned(),
        bits => format!("'{}'", ["sql", "sql,rust", "rust,french", "c++"][bits as usize - 2]),
    };
    let notes = match random.below(5) {
        0 => "NULL".to_owned(),
        n => format!(
            "'{} {}'",
            ["likes cats", "Likes Coffee ", "LIKES CYCLING", "plays\\nchess"][n as usize - 1],
            "·".repeat(random.below(40) as usize)
        ),
    };
    let rating =
        if random.below(10) == 0 { "NULL".to_owned() } else { format!("{}", random.below(40) as f64 / 8.0) };
    let badge =
        (id.wrapping_mul(0x9e37_79b9_7f4a_7c15)).to_be_bytes().iter().fold(String::new(), |mut hex, byte| {
            write!(hex, "{byte:02X}").expect("writing to a string does not fail");
            hex
        });
    format!(
        "{id},'{}','{first}','{last}','{}','{} {:02}:{:02}:00.{:03}',{skills},{notes},{rating},'{{\"level\": {}, \"tags\": [\"a\"]}}',X'{badge}',b'{}'",
        date(random, 1950, 30),
        ["M", "F", "X"][random.below(3) as usize],
        date(random, 1985, 20),
        random.below(24),
        random.below(60),
        random.below(1_000),
        random.below(9),
        random.below(2)
    )
}

fn date(random: &mut Random, year: u64, years: u64) -> String {
    format!("{}-{:02}-{:02}", year + random.below(years), 1 + random.below(12), 1 + random.below(28))
}

/// Multi-row inserts of about a megabyte, between LOCK and UNLOCK, as the dump program writes them.
struct Inserts<'a> {
    out: &'a mut dyn Write,
    table: &'static str,
    statement: String,
}

impl<'a> Inserts<'a> {
    fn new(out: &'a mut dyn Write, table: &'static str) -> Self {
        let statement =
            format!("LOCK TABLES `{table}` WRITE;\n/*!40000 ALTER TABLE `{table}` DISABLE KEYS */;\n");
        Self { out, table, statement }
    }
    fn row(&mut self, values: &str) -> io::Result<()> {
        let open = self.statement.ends_with(')');
        if open {
            self.statement.push_str(",(");
        } else {
            self.statement.push_str(&format!("INSERT INTO `{}` VALUES (", self.table));
        }
        self.statement.push_str(values);
        self.statement.push(')');
        if self.statement.len() > 1_000_000 {
            self.statement.push_str(";\n");
            self.out.write_all(self.statement.as_bytes())?;
            self.statement.clear();
        }
        Ok(())
    }
    fn end(mut self) -> io::Result<()> {
        if self.statement.ends_with(')') {
            self.statement.push_str(";\n");
        }
        self.statement
            .push_str(&format!("/*!40000 ALTER TABLE `{}` ENABLE KEYS */;\nUNLOCK TABLES;\n", self.table));
        self.out.write_all(self.statement.as_bytes())
    }
}
