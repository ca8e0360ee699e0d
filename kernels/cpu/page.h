/* The page of kernels/layout.py, in bytes from its start. A stored scale is S = 4 * scale, a stored zero point is
 * Z = zero_point - S. */
#pragma once

#define PAGE 32  /* tokens a page */
#define GROUP 32 /* channels of a value group */
#define MAX_HEAD_DIM 128
#define FOLD 4.0f

#define PAGE_BYTES(head_dim) (24 * (head_dim))
#define K_CODES(head_dim) 0
#define K_SCALE(head_dim) (8 * (head_dim))
#define K_ZERO(head_dim) (10 * (head_dim))
#define V_CODES(head_dim) (12 * (head_dim))
#define V_SCALE(head_dim) (20 * (head_dim))
#define V_ZERO(head_dim) (22 * (head_dim))
