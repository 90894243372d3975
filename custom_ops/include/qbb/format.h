/* Format 1 of qbb::BinaryBasisMatMul: the constants of docs/format.md for C and C++.
 *
 * qbb_export/format.py holds the same ones for Python; qbb_export.custom_ops compares the two when it opens the
 * library and refuses a mismatch.
 *
 * Layout 1 (tiled), the one that kernels read:
 *
 *            word 0 of 16 rows                  word 1 of 16 rows
 *     +------+------+-- --+-------+      +------+------+-- --+-------+
 *     | row0 | row1 | ... | row15 |      | row0 | row1 | ... | row15 |  ...  ceil(K/32) words, then the next tile
 *     +------+------+-- --+-------+      +------+------+-- --+-------+
 *        |
 *        |  one 32-bit word = 32 inputs of one row; a set bit is +1, a clear one -1
 *        v
 *     byte 3          byte 2          byte 1          byte 0
 *     28..31 12..15   24..27  8..11   20..23  4..7    16..19  0..3     <- inputs, counted within the word
 *     high    low     high    low     high    low     high    low      <- nibbles
 *
 * A 512-bit register then holds the same 32 inputs of 16 rows, and every nibble is an index into a 16-entry table.
 */
#ifndef QBB_FORMAT_H_
#define QBB_FORMAT_H_

#define QBB_DOMAIN "qbb"
#define QBB_OP_TYPE "BinaryBasisMatMul"

enum {
  QBB_OPSET_VERSION = 1,
  QBB_FORMAT_VERSION = 1,
  QBB_MAX_BASES = 8,
  QBB_LAYOUT_ROWS = 0,  /* B [bases, N, W], S [bases, N, G], Z [N, G]: for exchange, repacked when a kernel is created */
  QBB_LAYOUT_TILED = 1, /* B [bases, T, W, 16], S [bases, T, G, 16], Z [T, G, 16]: read in place */
  QBB_NUM_LAYOUTS = 2,
  QBB_WORD_BITS = 32,
  QBB_TILE_ROWS = 16,
  QBB_MODE_EXACT = 0, /* float activations */
  QBB_MODE_INT8 = 1,  /* activations rounded to 8 bits, for each row of X and each group */
  QBB_MODE_INT16 = 2, /* the same with 16 bits */
  QBB_NUM_MODES = 3
};

#endif /* QBB_FORMAT_H_ */
